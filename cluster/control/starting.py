"""Workers that die while they load: when the next may be started, and when there is no point in it any more."""

from __future__ import annotations

from elastic_moe.cluster.control.change import MAX_BACKOFF_S
from elastic_moe.cluster.placement import WorkerId

MAX_START_FAILURES = 3
"""Before the first epoch, more workers than these dying while they load are a lasting error."""


class Starts:
    """Owns the pause before the next start, and the verdict that no first epoch will ever be."""

    def __init__(self) -> None:
        self.fatal: str | None = None
        self.at = 0.0
        """No worker is started before."""
        self._failures = 0
        """Workers that died while they loaded, since one did load."""

    def failed(self, worker: WorkerId, reason: str, now: float) -> str | None:
        """A worker died while it loaded. Returns why that is one too many for a first epoch; None where it is not."""
        self._failures += 1
        self.at = now + min(MAX_BACKOFF_S, 0.25 * 2.0**self._failures)
        if self._failures <= MAX_START_FAILURES:
            return None
        return f"worker {worker} died while it loaded the model: {reason}"

    def succeeded(self) -> None:
        self._failures = 0

    def give_in(self, reason: str) -> None:
        """The first epoch will never be."""
        self.fatal = reason

    def resume(self) -> None:
        """The clock is another one."""
        self.at = 0.0
