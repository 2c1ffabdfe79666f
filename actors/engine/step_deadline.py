"""How long a step may take, derived from the durations of earlier steps of its size: the seconds until its workers are
pinged, and the seconds until the step is given up."""

from __future__ import annotations

from elastic_moe.actors.liveness import FLOOR_S, LATE_FACTOR, LATE_FLOOR_S

DECAY = 0.95
"""Factor by which the slowest duration shrinks with each step, so that one slow step is forgotten."""
LATE_DECAY = 0.8
"""As DECAY, where it is about a ping, which costs next to nothing: a worker's first steps are slow, and the loss of its
host soon after them would be found late."""


class StepDeadline:
    """Starts at the limit, and shrinks for each size of step as steps of that size prove quick.

    Sizes are distinguished by the number of binary digits of their tokens: a long prompt among decodes is no hang.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._slowest_s: dict[int, float] = {}
        self._slow_lately_s: dict[int, float] = {}

    def late_s(self, tokens: int) -> float:
        lately = self._slow_lately_s.get(tokens.bit_length(), self._limit_s)
        return min(self._limit_s, max(LATE_FLOOR_S, LATE_FACTOR * lately))

    def seconds(self, tokens: int) -> float:
        return min(self._limit_s, max(FLOOR_S, LATE_FACTOR * self._slowest(tokens)))

    def met(self, tokens: int, step_s: float) -> None:
        """A step took `step_s`."""
        size = tokens.bit_length()
        self._slowest_s[size] = max(step_s, DECAY * self._slowest(tokens))
        self._slow_lately_s[size] = max(step_s, LATE_DECAY * self._slow_lately_s.get(size, step_s))

    def missed(self, tokens: int) -> None:
        """A step was given up. The next one of its size gets more time, in case the step was only slow."""
        size = tokens.bit_length()
        self._slowest_s[size] = self._slow_lately_s[size] = self.seconds(tokens)

    def _slowest(self, tokens: int) -> float:
        return self._slowest_s.get(tokens.bit_length(), self._limit_s)
