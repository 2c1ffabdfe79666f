"""What others do: the experts stay that a profile counted most often. Only one slot of such a cache ever changes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from elastic_moe.optimizer.buffering.interface import first_of_least


class Static:
    """The expert leaves that has the least weight in `weights` [E], which never change."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = [float(weight) for weight in weights]

    def note(self, active: Sequence[int]) -> None:
        pass

    def victim(self, candidates: Sequence[int], needed: Collection[int]) -> int:
        return first_of_least(candidates, needed, self._weights)
