"""The experts to bring to workers before an epoch can begin: copies between workers, and reads from the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from elastic_moe.cluster.facts.events import ExpertKey
from elastic_moe.cluster.facts.membership import BoolArray, needs
from elastic_moe.cluster.placement import Move, Placement, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfers:
    copies: tuple[Move, ...] = ()
    reads: tuple[ExpertKey, ...] = ()
    """Experts that no living worker holds: their new owners read them from the checkpoint."""

    def __bool__(self) -> bool:
        return bool(self.copies or self.reads)


def plan_transfers(
    placement: Placement,
    has: Mapping[WorkerId, BoolArray],
    sources: Mapping[WorkerId, BoolArray],
    *,
    read_all: bool = False,
) -> Transfers:
    """Every expert that `placement` gives to a worker that does not have it.

    has: [L, E] experts that each member of `placement` holds or has staged.
    sources: [L, E] experts that each living worker can export; it may be a worker that leaves.
    read_all: read every expert from the checkpoint, because copies have failed.
    An expert is copied from the holder with the fewest copies so far, so that no worker becomes the bottleneck.
    """
    copies: list[Move] = []
    reads: list[ExpertKey] = []
    given = dict.fromkeys(sources, 0)
    for worker in placement.workers:
        missing = needs(placement, worker.id) & ~has[worker.id]
        for layer, expert in zip(*(axis.tolist() for axis in np.nonzero(missing)), strict=True):
            holders = [source for source, held in sources.items() if held[layer, expert] and source != worker.id]
            if not holders or read_all:
                reads.append((worker.id, layer, expert))
                continue
            source = min(holders, key=lambda holder: given[holder])
            given[source] += 1
            copies.append(Move(layer=layer, expert=expert, source=source, target=worker.id))
    return Transfers(copies=tuple(copies), reads=tuple(reads))
