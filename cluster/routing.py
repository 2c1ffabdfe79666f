"""Routing statistics: tokens per layer and expert over a sliding window, and how uneven they make the load.

Legend: L MoE layers, E logical experts, W workers, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.placement import EMPTY, Placement
from cluster.protocol import RoutingCounts

IntCounts = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(slots=True)
class _Bucket:
    """Counts of one stretch of time."""

    number: int
    tokens: int
    load: IntCounts
    transitions: npt.NDArray[np.uint32]


class RoutingWindow:
    """Sums of the hosts' reports over the last `window_s` seconds.

    Memory is bounded by `buckets`, whatever the number of reports: time is cut into `buckets` stretches and each keeps
    one sum, so the window's edge moves in steps of window_s / buckets. Transitions are kept in 32 bits: they are the
    bulk (58 layers of 256 experts: 15 MB a bucket).
    """

    def __init__(self, num_layers: int, num_experts: int, *, window_s: float, buckets: int = 6) -> None:
        assert window_s > 0
        assert buckets >= 1
        self.window_s = window_s
        self._shape = (num_layers, num_experts)
        self._bucket_s = window_s / buckets
        self._count = buckets
        self._buckets: list[_Bucket] = []

    def add(self, counts: RoutingCounts, now: float) -> None:
        """Take one host's report of what it ran since its previous one."""
        assert counts.load.shape == self._shape, f"load is {counts.load.shape}, expected {self._shape}"
        self._drop_old(now)
        if counts.tokens == 0:
            return
        bucket = self._bucket_of(now)
        bucket.tokens += counts.tokens
        bucket.load += counts.load
        np.add(bucket.transitions, counts.transitions, out=bucket.transitions, casting="unsafe")

    def tokens(self, now: float) -> int:
        self._drop_old(now)
        return sum(bucket.tokens for bucket in self._buckets)

    def load(self, now: float) -> IntCounts:
        """[L, E] tokens that chose each expert."""
        self._drop_old(now)
        return sum((bucket.load for bucket in self._buckets), np.zeros(self._shape, dtype=np.int64))

    def transitions(self, now: float) -> IntCounts:
        """[L-1, E, E] pairs of experts that one token chose in adjacent layers."""
        self._drop_old(now)
        total = np.zeros(self._transitions_shape, dtype=np.int64)
        for bucket in self._buckets:
            total += bucket.transitions
        return total

    @property
    def _transitions_shape(self) -> tuple[int, int, int]:
        layers, experts = self._shape
        return (max(0, layers - 1), experts, experts)

    def _bucket_of(self, now: float) -> _Bucket:
        number = int(now // self._bucket_s)
        if not self._buckets or self._buckets[-1].number < number:
            self._buckets.append(
                _Bucket(
                    number,
                    0,
                    np.zeros(self._shape, dtype=np.int64),
                    np.zeros(self._transitions_shape, dtype=np.uint32),
                )
            )
        return self._buckets[-1]

    def _drop_old(self, now: float) -> None:
        oldest = int(now // self._bucket_s) - self._count + 1
        self._buckets = [bucket for bucket in self._buckets if bucket.number >= oldest]


def load_per_worker(load: IntCounts, placement: Placement) -> FloatArray:
    """[L, W] tokens that each worker computes; the replicas of an expert share its tokens evenly."""
    table = placement.physical_to_logical_map
    rows = np.arange(table.shape[0])[:, None]
    filled = table != EMPTY
    replicas = np.zeros(load.shape, dtype=np.int64)
    np.add.at(replicas, (np.broadcast_to(rows, table.shape)[filled], table[filled]), 1)
    share = load / np.maximum(replicas, 1)
    per_slot = np.where(filled, share[rows, np.where(filled, table, 0)], 0.0)
    return np.add.reduceat(per_slot, placement.first_slot, axis=1)


def load_imbalance(load: IntCounts, placement: Placement) -> FloatArray:
    """[L] the busiest worker's load over the mean; 1.0 where nothing was counted."""
    per_worker = load_per_worker(load, placement)
    mean = per_worker.mean(axis=1)
    return np.where(mean > 0, per_worker.max(axis=1) / np.where(mean > 0, mean, 1.0), 1.0)
