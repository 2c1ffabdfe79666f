"""Runs a policy on the steps of one layer, as a worker's cache does, and counts accesses and hits.

An expert with tokens in a step is one access, and a hit if it was in the cache when the step began. Experts in the
cache are computed first; then the missing ones come in their order, each into a free slot or into the victim's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from elastic_moe.optimizer.buffering.interface import Policy

Step = Sequence[int]
"""The distinct experts of one layer that have tokens in a step, those with the most tokens first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCounts:
    """What one layer's cache has done."""

    accesses: int
    hits: int
    misses_by_step: tuple[int, ...]
    """Misses of each counted step."""

    @property
    def miss_rate(self) -> float:
        """Share of accesses that missed; 0 without accesses."""
        return (self.accesses - self.hits) / max(self.accesses, 1)


class Cache:
    """The experts that one layer's slots hold: `pinned` ones for ever, and `area` slots that a policy fills."""

    def __init__(self, policy: Policy, area: int, pinned: Collection[int] = ()) -> None:
        if area < 1:
            raise ValueError(f"area: expected at least one slot, got {area}")
        self._policy, self._area = policy, area
        self._pinned = frozenset(pinned)
        self._held: dict[int, None] = {}  # in the order of arrival

    def step(self, active: Step) -> int:
        """Serve a step; returns the number of misses."""
        self._policy.note(active)
        missing = [expert for expert in active if expert not in self._pinned and expert not in self._held]
        for expert in missing:
            if len(self._held) == self._area:
                # whatever is in the cache has been computed by now, or has no tokens
                del self._held[self._policy.victim(list(self._held), ())]
            self._held[expert] = None
        return len(missing)


def replay(
    steps: Sequence[Step], policy: Policy, area: int, *, pinned: Collection[int] = (), skip: int = 0
) -> CacheCounts:
    """Serve all steps from an empty area, and count those after the first `skip`. Raises ValueError for no slot."""
    cache = Cache(policy, area, pinned)
    return counted(steps, [cache.step(step) for step in steps], skip)


def counted(steps: Sequence[Step], misses: Sequence[int], skip: int) -> CacheCounts:
    """The counts of all steps after the first `skip`."""
    accesses = sum(len(step) for step in steps[skip:])
    return CacheCounts(accesses=accesses, hits=accesses - sum(misses[skip:]), misses_by_step=tuple(misses[skip:]))
