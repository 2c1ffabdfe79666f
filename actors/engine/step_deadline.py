"""How long a step may take, told from how long steps of its size have taken: until those who run it are asked whether
they live, and until somebody is taken to hang who does."""

from __future__ import annotations

from elastic_moe.actors.liveness import FLOOR_S, LATE_FACTOR, LATE_FLOOR_S

DECAY = 0.95
"""Per step: how fast a slow one is forgotten."""


class StepDeadline:
    """Begins at its limit, and comes down for every size of steps as they are seen to be quick.

    Sizes are told apart by the number of binary digits of their tokens: a long prompt among decodes is no hang.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._slowest_s: dict[int, float] = {}

    def late_s(self, tokens: int) -> float:
        return min(self._limit_s, max(LATE_FLOOR_S, LATE_FACTOR * self._slowest(tokens)))

    def seconds(self, tokens: int) -> float:
        return min(self._limit_s, max(FLOOR_S, LATE_FACTOR * self._slowest(tokens)))

    def met(self, tokens: int, step_s: float) -> None:
        """A step took `step_s`."""
        self._slowest_s[tokens.bit_length()] = max(step_s, DECAY * self._slowest(tokens))

    def missed(self, tokens: int) -> None:
        """A step was given up. Should it be slow and not hang, it gets longer the next time."""
        self._slowest_s[tokens.bit_length()] = self.seconds(tokens)

    def _slowest(self, tokens: int) -> float:
        return self._slowest_s.get(tokens.bit_length(), self._limit_s)
