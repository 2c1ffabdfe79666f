"""What a cache of experts asks its policy. A policy belongs to one layer of one worker; it knows neither weights
nor time.

In a step, the cache calls `note` with the experts that have tokens, computes those that it holds, and then
fetches the missing ones one after another. Where no slot is free, it asks `victim` which expert leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol


class Policy(Protocol):
    """Ranks the experts in a cache. Every call is deterministic."""

    def note(self, active: Sequence[int]) -> None:
        """A step begins, in which the distinct experts `active` have tokens, those with the most tokens first."""

    def victim(self, candidates: Sequence[int], needed: Collection[int]) -> int:
        """The expert of `candidates` that leaves the cache.

        `candidates` are the experts in the cache that are not pinned, in the order of their arrival, oldest first.
        `needed` are the experts that the step still has to compute: none of them is chosen, and the caller asks only
        where another candidate is left.
        """


def first_of_least(candidates: Sequence[int], needed: Collection[int], value: Sequence[float]) -> int:
    """The candidate of least `value` [E] that is not needed; the oldest of equal ones."""
    return min((expert for expert in candidates if expert not in needed), key=value.__getitem__)
