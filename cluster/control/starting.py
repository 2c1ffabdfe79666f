"""Workers that die while they load, or cannot join: when the next may be started, and when to stop trying."""

from __future__ import annotations

from elastic_moe.cluster.control.change import MAX_BACKOFF_S
from elastic_moe.cluster.placement import WorkerId

MAX_START_FAILURES = 3
"""Before the first epoch, a lasting error is reported if more workers than this die while they load."""
JOIN_PAUSE_S = 30.0
"""Seconds until another worker is started for one that could not join. Each further one doubles them."""
MAX_JOIN_PAUSE_S = 600.0


class Starts:
    """Owns the pause before the next start, and the verdict that there will never be a first epoch."""

    def __init__(self) -> None:
        self.fatal: str | None = None
        self.at = 0.0
        """No worker is started before this time."""
        self._failures = 0
        """Number of workers that died while they loaded, since the last one that loaded."""
        self._unjoined = 0
        """Number of workers that were given up because they could not join, since a group last formed."""

    def failed(self, worker: WorkerId, reason: str, now: float) -> str | None:
        """A worker died while it loaded. Returns the lasting error if too many have died, else None."""
        self._failures += 1
        self.at = now + min(MAX_BACKOFF_S, 0.25 * 2.0**self._failures)
        if self._failures <= MAX_START_FAILURES:
            return None
        return f"worker {worker} died while it loaded the model: {reason}"

    def could_not_join(self, now: float) -> None:
        """A worker was given up that had loaded and could not join the others. The next is likely to fare alike."""
        self.at = now + min(MAX_JOIN_PAUSE_S, JOIN_PAUSE_S * 2.0**self._unjoined)
        self._unjoined += 1

    def joined(self) -> None:
        self._unjoined = 0

    def succeeded(self) -> None:
        self._failures = 0

    def give_in(self, reason: str) -> None:
        """There will never be a first epoch."""
        self.fatal = reason

    def resume(self) -> None:
        """Set all times by the clock of a restarted coordinator."""
        self.at = 0.0
