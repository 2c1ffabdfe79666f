"""Which workers move to nodes that have come after they were started, so that they do not share one node's cores.

A cluster often begins to serve before all its machines are there. Ray spreads workers over the nodes that it has when
they start (actors/coordinator/fleet.py), and moves none later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elastic_moe.cluster.facts.facts import Choice, Facts
from elastic_moe.cluster.facts.membership import WorkerRecord
from elastic_moe.cluster.placement import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Relocation:
    worker: WorkerId
    """It serves until another one has loaded in its place."""
    node: str
    """Where the other one is to run."""


def relocations(facts: Facts, fresh: Mapping[str, int], now: float) -> Choice[tuple[Relocation, ...]]:
    """The workers to move now: as few as even nodes out. fresh: free cores of nodes that no worker has run on."""
    if not fresh:
        return Choice((), "no node has come")
    if facts.pinned:
        return Choice((), "the placement is pinned")
    if not facts.whole or now < facts.start_at or facts.moving or not all(r.loaded for r in facts.alive):
        return Choice((), "something else is under way")
    crowds: dict[str, list[WorkerRecord]] = {}
    for record in facts.staying:
        assert record.info is not None
        crowds.setdefault(record.info.node, []).append(record)
    room, count = dict(fresh), dict.fromkeys(fresh, 0)
    found: list[Relocation] = []
    while open_nodes := [node for node, cores in room.items() if cores]:
        node = min(open_nodes, key=lambda node: (count[node], node))
        crowd = max(crowds.values(), key=len)
        if len(crowd) - count[node] < 2:
            break
        found.append(Relocation(worker=crowd.pop().id, node=node))
        room[node] -= 1
        count[node] += 1
    if not found:
        return Choice((), "workers are spread over the nodes")
    return Choice(tuple(found), f"{', '.join(r.worker for r in found)} move to nodes that have come")


def replaced(facts: Facts) -> tuple[WorkerId, ...]:
    """Workers that move, and may leave now, because others have loaded in their place."""
    if not (facts.serves and facts.interruptible):
        return ()
    loaded, moving = [r for r in facts.staying if r.loaded], [r.id for r in facts.moving]
    return tuple(moving[: max(0, len(loaded) + len(moving) - facts.target)])


def stranded(facts: Facts) -> tuple[WorkerId, ...]:
    """Workers that were to move, and stay, because the others were lost before they had loaded."""
    return tuple([r.id for r in facts.moving][: max(0, facts.target - len(facts.staying))])
