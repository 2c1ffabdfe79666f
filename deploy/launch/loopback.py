"""The one port of a replica that Ray Serve opens on every address of the machine, whatever it is told.

It takes calls from other deployments by gRPC, whose bodies are pickles: Ray's token guards it. A Ray of our own has its
node at 127.0.0.1, and then the port is opened there.
"""

from __future__ import annotations

import ray
from ray.serve._private import replica

from elastic_moe.cluster.peers import is_loopback

_EVERYWHERE = "[::]:"


def keep_calls_local() -> None:
    """To be called in a replica before it opens its ports: from the constructor of the application."""
    address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    add_port = getattr(replica, "add_port_to_grpc_server", None)
    if add_port is None or not is_loopback(address):
        return

    def add_local_port(server: object, where: str) -> int:
        return int(add_port(server, where.replace(_EVERYWHERE, f"{address}:")))

    setattr(replica, "add_port_to_grpc_server", add_local_port)  # noqa: B010
