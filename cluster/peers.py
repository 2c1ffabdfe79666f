"""Who sends requests, and to which name: client addresses, trusted proxies, origins of pages, the Host header, and the
path that a proxy serves."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_moe.cluster.errors import ConfigError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PEER_HEADER = "x-emoe-peer"
"""HAProxy writes the client's address into this header, and replaces what the client wrote there."""
LOOPBACK_NETWORKS: tuple[Network, ...] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
EVERYWHERE: tuple[Network, ...] = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s,]+|null")
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
OWN_PATHS = ("v1", "admin", "page")
"""First parts of this server's paths that have further parts."""


@dataclass(frozen=True, slots=True)
class Networks:
    """Addresses of proxies whose X-Forwarded-For header is believed."""

    networks: tuple[Network, ...]

    @classmethod
    def parse(cls, text: str) -> Networks:
        """Read addresses and networks separated by commas; `*` means all. Raises ConfigError for other text."""
        found: list[Network] = []
        for part in filter(None, (part.strip() for part in text.split(","))):
            try:
                found += EVERYWHERE if part == "*" else (ipaddress.ip_network(part, strict=False),)
            except ValueError:
                raise ConfigError(
                    f"forwarded_allow_ips: expected addresses or networks separated by commas, or *, got {part!r}"
                ) from None
        return cls(tuple(found))

    def __contains__(self, address: str) -> bool:
        parsed = parse_address(address)
        return parsed is not None and any(
            network.version == parsed.version and parsed in network for network in self.networks
        )


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address in `text`, None if it is none. An IPv4 address in IPv6 form (::ffff:1.2.3.4) becomes IPv4."""
    try:
        address = ipaddress.ip_address(text.strip().strip("[]"))
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or a name, means this machine only."""
    address = parse_address(host)
    return host == "localhost" if address is None else address.is_loopback


def client_address(peer: str, forwarded_for: Sequence[str], trusted: Networks) -> str:
    """The address of the client that sent a request.

    peer: the address that the connection comes from.
    forwarded_for: the X-Forwarded-For headers, in their order. Each proxy appends the address that called it. So they
    are read from the right, as long as the proxy that appended an address is trusted.
    """
    if peer not in trusted:
        return peer
    for hop in reversed(",".join(forwarded_for).split(",")):
        address = parse_address(hop)
        if address is None:
            break
        peer = str(address)
        if peer not in trusted:
            break
    return peer


HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+?)\.?)(?::\d*)?")


def host_name(header: str) -> str:
    """The name or address in a Host header, in lower case and without its port; empty where there is none."""
    found = HOST.fullmatch(header.strip().lower())
    return (found[1] or found[2]) if found else ""


def is_allowed_host(header: str, allowed: Sequence[str]) -> bool:
    """Whether a server on loopback answers a request with this Host header.

    It refuses other names, because a web page can make its own name point to 127.0.0.1 (DNS rebinding) and then read
    the answers.
    """
    name = host_name(header)
    return is_loopback(name) or name.endswith(".localhost") or name in allowed or "*" in allowed


def check_origins(origins: Sequence[str]) -> None:
    """Raises ConfigError for what is no origin of a page, nor `*`."""
    for origin in origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"allowed_origins: expected origins such as https://chat.example.org, or *, got {origin!r}"
            )


def check_root_path(path: str) -> None:
    """Raises ConfigError for what is no path, and for one that this server's own would be taken for."""
    if path and not ROOT_PATH.fullmatch(path):
        raise ConfigError(f"root_path: expected a path such as /llm, got {path!r}")
    if path.split("/")[1:2] in ([name] for name in OWN_PATHS):
        raise ConfigError(f"root_path: {path} is the beginning of this server's own paths; use another")
