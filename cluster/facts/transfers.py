"""The experts to bring to workers before an epoch can begin: copies between workers, and reads from the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from elastic_moe.cluster.facts.events import ExpertKey
from elastic_moe.cluster.facts.membership import BoolArray, entries, needs
from elastic_moe.cluster.placement import Move, Placement, WorkerId

BUNDLE_BYTES = 64 << 20
"""Experts that workers on GPUs send one another together take at most this, or are one. What a bundle waits for, two
calls and the device at either end, takes as long as some tens of megabytes."""
AT_ONCE_ON_GPUS = 3
"""Bundles that a worker on a GPU takes part in at a time: most of a bundle's time is waiting."""


def bundles_at_once(nbytes: int) -> int:
    """How many of so many bytes a worker on a GPU takes part in at a time. Experts that are larger than a bundle go one
    by one: every bundle under way takes twice its bytes of a GPU."""
    return AT_ONCE_ON_GPUS if nbytes <= BUNDLE_BYTES else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfers:
    copies: tuple[Move, ...] = ()
    reads: tuple[ExpertKey, ...] = ()
    """Experts that no living worker holds: their new owners read them from the checkpoint."""

    def __bool__(self) -> bool:
        return bool(self.copies or self.reads)

    def __reduce__(self) -> Any:
        # thousands of moves are written in a fifth of the time as columns
        return _of_columns, (tuple(zip(*self.copies, strict=True)), self.reads)


def _of_columns(copies: tuple[Sequence[Any], ...], reads: tuple[ExpertKey, ...]) -> Transfers:
    return Transfers(copies=tuple(map(Move, *copies)) if copies else (), reads=reads)


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
    An expert is copied from the holder with the fewest copies so far, so that no worker becomes the bottleneck. Of a
    worker's, those with a single holder count first.
    """
    copies: list[Move] = []
    reads: list[ExpertKey] = []
    names = np.array([*sources], dtype=np.object_)
    held = np.stack([*sources.values()]) if sources else np.zeros((0, placement.num_layers, 0), dtype=np.bool_)
    given = [0] * len(names)
    for worker in placement.workers:
        # all of a worker's at once: the coordinator's loop waits for it
        layers, experts = entries(needs(placement, worker.id) & ~has[worker.id])
        if not len(layers):
            continue
        number, source = np.nonzero((held[:, layers, experts] & (names != worker.id)[:, None]).T)
        if read_all:
            number = source = number[:0]
        holders = np.bincount(number, minlength=len(layers))
        first = np.searchsorted(number, np.arange(len(layers)))
        chosen = source[np.minimum(first, len(source) - 1)] if len(source) else np.zeros_like(layers)
        for holder, count in enumerate(np.bincount(chosen[holders == 1], minlength=len(names)).tolist()):
            given[holder] += count
        for at in np.flatnonzero(holders > 1).tolist():
            best = min(source[first[at] : first[at] + holders[at]].tolist(), key=given.__getitem__)
            given[best] += 1
            chosen[at] = best
        copied, read = np.flatnonzero(holders), np.flatnonzero(holders == 0)
        keys = (layers[copied].tolist(), experts[copied].tolist(), names[chosen[copied]].tolist())
        copies += map(Move, *keys, repeat(worker.id))
        reads += zip(repeat(worker.id), layers[read].tolist(), experts[read].tolist())
    return Transfers(copies=tuple(copies), reads=tuple(reads))
