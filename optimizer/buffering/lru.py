"""The expert leaves whose last step with tokens is the longest ago."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from elastic_moe.optimizer.buffering.interface import first_of_least


class Lru:
    """Least recently used; of experts that were last used in the same step, the one that came first."""

    def __init__(self, num_experts: int) -> None:
        self._last = [-1] * num_experts
        self._step = -1

    def note(self, active: Sequence[int]) -> None:
        self._step += 1
        for expert in active:
            self._last[expert] = self._step

    def victim(self, candidates: Sequence[int], needed: Collection[int]) -> int:
        return first_of_least(candidates, needed, self._last)
