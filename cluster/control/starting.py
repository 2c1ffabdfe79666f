"""Workers that die while they load: when the next worker may be started, and when to stop trying."""

from __future__ import annotations

from elastic_moe.cluster.control.change import MAX_BACKOFF_S
from elastic_moe.cluster.placement import WorkerId

MAX_START_FAILURES = 3
"""Before the first epoch, a lasting error is reported if more workers than this die while they load."""


class Starts:
    """Owns the pause before the next start, and the verdict that there will never be a first epoch."""

    def __init__(self) -> None:
        self.fatal: str | None = None
        self.at = 0.0
        """No worker is started before this time."""
        self._failures = 0
        """Number of workers that died while they loaded, since the last one that loaded."""

    def failed(self, worker: WorkerId, reason: str, now: float) -> str | None:
        """A worker died while it loaded. Returns the lasting error if too many have died, else None."""
        self._failures += 1
        self.at = now + min(MAX_BACKOFF_S, 0.25 * 2.0**self._failures)
        if self._failures <= MAX_START_FAILURES:
            return None
        return f"worker {worker} died while it loaded the model: {reason}"

    def succeeded(self) -> None:
        self._failures = 0

    def give_in(self, reason: str) -> None:
        """There will never be a first epoch."""
        self.fatal = reason

    def resume(self) -> None:
        """Set all times by the clock of a restarted coordinator."""
        self.at = 0.0
