"""Totals of the control plane for /metrics. They are part of the saved state, so a restarted coordinator keeps them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from enum import StrEnum

from elastic_moe.cluster.facts.facts import Cause, Stage
from elastic_moe.cluster.messages.epochs import FetchSource, StallCause, TierCounts
from elastic_moe.cluster.placement import Tier

BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the buckets of every distribution; one more is open-ended."""

TIMED_STAGES = (Stage.PLANNING, Stage.TRANSFERRING, Stage.PREPARING, Stage.COMMITTING)
"""Stages of a re-placement, which drains no worker."""


class RebalanceResult(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"
    UNDONE = "undone"
    """Undone later, because it had made steps longer; it was counted as completed before."""


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
    """Seconds of each stage, in re-placements alone."""
    experts_moved: int = 0
    bytes_moved: int = 0
    recoveries: dict[Cause, int] = field(default_factory=lambda: dict.fromkeys(Cause, 0))
    """Number of recoveries by cause. One that had several causes counts for the first."""
    recovery_s: Distribution = field(default_factory=Distribution)
    """Seconds from the moment at which an epoch was found broken until the next one served."""
    requests_moved: int = 0
    """Requests that lost their worker, or had to leave it, and were computed again elsewhere."""
    expert_accesses: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    """Active experts, summed over steps and layers, of workers that serve some experts from another tier than the
    device, and (below) what those workers fetched and waited for."""
    fetched_bytes: dict[FetchSource, int] = field(default_factory=lambda: dict.fromkeys(FetchSource, 0))
    stall_s: dict[StallCause, float] = field(default_factory=lambda: dict.fromkeys(StallCause, 0.0))

    def add_tiers(self, counts: TierCounts) -> None:
        """Take one worker's report of what it did since its previous one."""
        for tier, accesses in zip(Tier, counts.accesses, strict=True):
            self.expert_accesses[tier] += accesses
        for source, nbytes in counts.fetched_bytes.items():
            self.fetched_bytes[source] += nbytes
        for cause, seconds in counts.stall_s.items():
            self.stall_s[cause] += seconds
