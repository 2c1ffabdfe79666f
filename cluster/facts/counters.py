"""Totals of the control plane for /metrics. They are part of the saved state, so a restarted coordinator keeps them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from enum import StrEnum

from elastic_moe.cluster.facts.facts import Cause, Stage

BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the buckets of every distribution; one more is open-ended."""

TIMED_STAGES = (Stage.PLANNING, Stage.TRANSFERRING, Stage.PREPARING, Stage.COMMITTING)
"""Stages of a re-placement, which drains no worker."""


class RebalanceResult(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(slots=True)
class Distribution:
    """Durations, counted by bucket."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds


@dataclass(slots=True, kw_only=True)
class ClusterCounters:
    rebalances: dict[RebalanceResult, int] = field(default_factory=lambda: dict.fromkeys(RebalanceResult, 0))
    rebalance_s: dict[Stage, Distribution] = field(
        default_factory=lambda: {stage: Distribution() for stage in TIMED_STAGES}
    )
    """Of re-placements alone."""
    experts_moved: int = 0
    bytes_moved: int = 0
    recoveries: dict[Cause, int] = field(default_factory=lambda: dict.fromkeys(Cause, 0))
    """By cause: the first one, where one recovery had several."""
    recovery_s: Distribution = field(default_factory=Distribution)
    """From the moment an epoch was found broken until the next one served."""
    requests_moved: int = 0
    """Requests that lost their worker, or had to leave it, and were computed again elsewhere."""
