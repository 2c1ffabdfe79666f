"""Whether a re-placement that was carried out has made steps longer, on the tokens that came since: then it is undone.

Both placements are priced on the same tokens, so what else changes meanwhile does not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from elastic_moe.cluster.placement import Placement

MOST_HARM = 0.02
"""Share by which steps may have become longer."""

WINDOWS = 2
"""Number of windows of statistics after which a re-placement that did no harm is settled."""


class Verdict(StrEnum):
    """What a trial has shown so far."""

    OPEN = "open"
    SETTLED = "settled"
    HARMFUL = "harmful"


@dataclass(slots=True, kw_only=True)
class Trial:
    """One re-placement on trial."""

    before: Placement
    """The placement to go back to."""
    begun_s: float
    window_s: float
    old_s: float = 0.0
    new_s: float = 0.0

    def add(self, *, old_s: float, new_s: float, tokens: float) -> None:
        """Count `tokens` tokens, for which a step costs these seconds under the old and under the new placement."""
        self.old_s += tokens * old_s
        self.new_s += tokens * new_s

    @property
    def harm(self) -> float:
        """Share by which steps have become longer; negative where they are shorter."""
        return self.new_s / self.old_s - 1 if self.old_s else 0.0

    def verdict(self, now: float) -> Verdict:
        """It is harmful once a whole window shows harm, and settled after WINDOWS windows."""
        if now - self.begun_s >= self.window_s and self.harm > MOST_HARM:
            return Verdict.HARMFUL
        return Verdict.SETTLED if now - self.begun_s >= WINDOWS * self.window_s else Verdict.OPEN
