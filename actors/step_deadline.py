"""How long a step may take before somebody is taken to hang: told from how long steps of its size have taken."""

from __future__ import annotations

FACTOR = 10.0
"""A step may take so many times the slowest one of its size lately."""
FLOOR_S = 1.0
"""Whoever is given up wrongly costs a new group, and is given more time the next time."""
DECAY = 0.95
"""Per step: how fast a slow one is forgotten."""


class StepDeadline:
    """Begins at its limit, and comes down for every size of steps as they are seen to be quick.

    Sizes are told apart by the number of binary digits of their tokens: a long prompt among decodes is no hang.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._slowest_s: dict[int, float] = {}

    def seconds(self, tokens: int) -> float:
        slowest_s = self._slowest_s.get(tokens.bit_length(), self._limit_s)
        return min(self._limit_s, max(FLOOR_S, FACTOR * slowest_s))

    def met(self, tokens: int, step_s: float) -> None:
        """A step took `step_s`."""
        size = tokens.bit_length()
        self._slowest_s[size] = max(step_s, DECAY * self._slowest_s.get(size, self._limit_s))

    def missed(self, tokens: int) -> None:
        """A step was given up. Should it be slow and not hang, it gets longer the next time."""
        self._slowest_s[tokens.bit_length()] = self.seconds(tokens)
