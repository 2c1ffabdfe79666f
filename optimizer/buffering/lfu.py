"""The expert leaves that had tokens in the fewest steps since the cache began."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from elastic_moe.optimizer.buffering.interface import first_of_least


class Lfu:
    """Least frequently used; of equally frequent experts, the one that came first."""

    def __init__(self, num_experts: int) -> None:
        self._steps = [0] * num_experts

    def note(self, active: Sequence[int]) -> None:
        for expert in active:
            self._steps[expert] += 1

    def victim(self, candidates: Sequence[int], needed: Collection[int]) -> int:
        return first_of_least(candidates, needed, self._steps)
