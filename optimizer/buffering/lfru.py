"""Recency and frequency together: the default policy.

Each expert has a value that rises when it has tokens and fades with time, as in LRFU (Lee et al. 2001). One fading rate
suits one load only: a single sequence asks for what it used a few steps ago, and a full batch for what is frequent over
hundreds of steps. So the value is the sum of a fast average and a slow one. Where few experts are active the fast one
tells them apart; where most are active in every step it is much the same for all, and the slow one decides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from elastic_moe.optimizer.buffering.interface import first_of_least

FAST = 0.3
"""Share of the newest step in the fast average."""

SLOW = 0.01
"""Share of the newest step in the slow average."""

SLOW_WEIGHT = 3.0
"""Weight of the slow average, where the fast one has 1."""


class Lfru:
    """The expert leaves that has the least recent and frequent use."""

    def __init__(self, num_experts: int) -> None:
        self._fast = np.zeros(num_experts)
        self._slow = np.zeros(num_experts)
        self._noted = 0
        self._value: list[float] = [0.0] * num_experts

    def note(self, active: Sequence[int]) -> None:
        self._noted += 1
        # until the slow average has seen enough steps, it is a plain mean of those
        slow = max(SLOW, 1 / self._noted)
        self._fast *= 1 - FAST
        self._slow *= 1 - slow
        index = np.asarray(active, dtype=np.intp)
        self._fast[index] += FAST
        self._slow[index] += slow
        self._value = (self._fast + SLOW_WEIGHT * self._slow).tolist()

    def victim(self, candidates: Sequence[int], needed: Collection[int]) -> int:
        return first_of_least(candidates, needed, self._value)
