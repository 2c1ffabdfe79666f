"""The nodes of a Ray cluster, as far as workers need them: where workers may run, and what they wait for. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

GPU, CPU, MEMORY = "GPU", "CPU", "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A living node. Amounts are Ray's: GPUs and cores that were given to Ray."""

    id: str
    head: bool = False
    total: Mapping[str, float] = field(default_factory=dict)
    free: Mapping[str, float] = field(default_factory=dict)
    drains: bool = False
    """It is about to leave, and takes no new process."""


def homes(nodes: Sequence[Node], device: str, *, on_head: bool) -> tuple[Node, ...]:
    """The nodes on which a worker of this device (cpu or cuda) may run, whether they have room or not.

    on_head: whether workers on CPUs may run on the head, which other processes of the server need.
    """
    needed = GPU if device == "cuda" else CPU
    return tuple(
        node
        for node in nodes
        if node.total.get(needed, 0) >= 1 and not node.drains and (on_head or device == "cuda" or not node.head)
    )


def shortage(nodes: Sequence[Node], device: str, *, on_head: bool) -> str | None:
    """What the next worker waits for, in words that follow "waits for"; None if there is room for it."""
    needed = GPU if device == "cuda" else CPU
    what = "a GPU" if device == "cuda" else "a CPU core"
    where = homes(nodes, device, on_head=on_head)
    if any(node.free.get(needed, 0) >= 1 for node in where):
        return None
    if where:
        total = sum(node.total.get(needed, 0) for node in where)
        return f"{what}: none of the cluster's {total:g} is free"
    elsewhere = homes(nodes, device, on_head=True)
    if elsewhere and not on_head:
        return f"{what} on a node that is not the head: the cluster has none (--workers-on-head allows the head)"
    return f"{what}: the cluster has none"


def free_cores(nodes: Sequence[Node]) -> dict[str, int]:
    """Whole cores that are free on each of these nodes that has any."""
    cores = {node.id: int(node.free.get(CPU, 0)) for node in nodes}
    return {node: free for node, free in cores.items() if free}


def threads(nodes: Sequence[Node]) -> int:
    """Cores that the workers of one of these nodes share: of the smallest one, since any may get the next worker."""
    return max(1, int(min((node.total.get(CPU, 1.0) for node in nodes), default=1.0)))


def all_cores(nodes: Sequence[Node]) -> int:
    """Whole cores of all nodes together, in use or not, but those of nodes that are about to leave."""
    return int(sum(node.total.get(CPU, 0) for node in nodes if not node.drains))
