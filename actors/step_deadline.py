"""How long a step may take before somebody is taken to hang: told from how long steps have taken."""

from __future__ import annotations

FACTOR = 10.0
"""A step may take so many times the slowest one lately: a long prompt among decodes is no hang."""
FLOOR_S = 10.0
DECAY = 0.98
"""Per step: how fast a slow one is forgotten."""


class StepDeadline:
    """Begins at its limit, and comes down as steps are seen to be quick."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._slowest_s = limit_s

    @property
    def seconds(self) -> float:
        return min(self._limit_s, max(FLOOR_S, FACTOR * self._slowest_s))

    def met(self, step_s: float) -> None:
        """A step took `step_s`."""
        self._slowest_s = max(step_s, DECAY * self._slowest_s)

    def missed(self) -> None:
        """A step was given up. Should it be slow and not hang, it gets longer the next time."""
        self._slowest_s = self.seconds
