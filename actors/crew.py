"""The API replicas that there are, as the coordinator knows them: each checks in once in a while. Pure.

When the server stops, a number of running requests is worth something only if the replica counted them after it had
begun to refuse new ones: so each report says whether it did. A replica that is silent may just be slow to hear of the
stop, and a coordinator that has just started knows nobody yet: both get AWAY_S from the stop on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from elastic_moe.actors.liveness import AWAY_S

FORGOTTEN_S = 60.0
"""A replica that has not checked in for so long holds up no stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    seen_at: float
    running: int
    refuses: bool

    @property
    def left(self) -> int:
        """A replica that does not refuse yet may still accept a request, so it counts as busy."""
        return self.running if self.refuses else max(1, self.running)


class Crew:
    def __init__(self, expected: int) -> None:
        """`expected`: number of replicas that the server has."""
        self._expected = expected
        self._reports: dict[str, _Report] = {}
        self._stopped_at = math.inf

    def check_in(self, name: str, running: int, refuses: bool, now: float) -> None:
        """`running`: number of requests that the replica runs. `refuses`: whether it refused new ones before it
        counted them."""
        self._reports = {n: report for n, report in self._reports.items() if now - report.seen_at < FORGOTTEN_S}
        self._reports[name] = _Report(seen_at=now, running=running, refuses=refuses)

    def expect(self, replicas: int) -> None:
        """The server has this number of replicas from now on."""
        self._expected = replicas

    def present(self, now: float) -> int:
        """Number of replicas that have checked in lately."""
        return sum(now - report.seen_at < AWAY_S for report in self._reports.values())

    def go_on(self) -> None:
        """The server does not stop after all."""
        self._stopped_at = math.inf

    def check_out(self, name: str, now: float) -> int:
        """The replica ends. Returns how many others there are."""
        if self._reports.pop(name, None) is not None:
            self._expected = max(0, self._expected - 1)
        return self.present(now)

    def left(self, now: float) -> int:
        """The server stops, since the first call of this. Returns the number of requests that still run, where a
        replica that has not said yet that it refuses new ones counts as busy."""
        self._stopped_at = min(self._stopped_at, now)
        unknown = max(0, self._expected - len(self._reports)) if now - self._stopped_at < AWAY_S else 0
        return unknown + sum(
            report.left for report in self._reports.values() if now - max(report.seen_at, self._stopped_at) < AWAY_S
        )
