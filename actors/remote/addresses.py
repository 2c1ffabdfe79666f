"""Which address of its node a process listens at."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence

import psutil
import ray

from elastic_moe.cluster.errors import ConfigError


def node_address(interface: str | None = None) -> str:
    """The IP address that other nodes reach this one by: the one by which Ray knows it, or that of `interface`, a name
    or a network. Raises ConfigError if this node has no such interface."""
    known = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    if interface is None:
        return known
    families = (socket.AF_INET, socket.AF_INET6)
    found = {
        name: [address.address.split("%")[0] for address in addresses if address.family in families]
        for name, addresses in psutil.net_if_addrs().items()
    }
    return choose(interface, known, found)


def choose(interface: str, known: str, found: Mapping[str, Sequence[str]]) -> str:
    """The address of `interface` among those of each interface that were found. One of the family of `known` comes
    first, and `known` itself before all others. Raises ConfigError."""
    try:
        network = ipaddress.ip_network(interface, strict=False)
    except ValueError:
        addresses = list(found.get(interface, []))
    else:
        every = [address for addresses in found.values() for address in addresses]
        addresses = [address for address in every if ipaddress.ip_address(address) in network]
    if not addresses:
        there = ", ".join(f"{name} ({', '.join(own)})" for name, own in found.items() if own)
        raise ConfigError(
            f"interface: expected the name of an interface or a network with an address of the node {known}, which has"
            f" {there}; got {interface!r}"
        )
    return min(addresses, key=lambda address: (address != known, (":" in address) != (":" in known)))
