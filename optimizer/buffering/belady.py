"""The expert leaves whose next use is the farthest (Belady 1966, MIN). No policy misses less; it knows the future."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from elastic_moe.optimizer.buffering.interface import first_of_least


class Belady:
    """MIN for the steps that will be noted: `steps` holds the active experts of each, in their order."""

    def __init__(self, num_experts: int, steps: Sequence[Sequence[int]]) -> None:
        never = len(steps)
        self._after: list[list[int]] = []
        upcoming = [never] * num_experts
        for step in range(never - 1, -1, -1):
            self._after.append(upcoming)
            upcoming = upcoming.copy()
            for expert in steps[step]:
                upcoming[expert] = step
        # popped from the end, so that what follows the first step comes first
        self._soon: list[int] = []

    def note(self, active: Sequence[int]) -> None:
        self._soon = [-step for step in self._after.pop()]

    def victim(self, candidates: Sequence[int], needed: Collection[int]) -> int:
        return first_of_least(candidates, needed, self._soon)
