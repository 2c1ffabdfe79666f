"""The API replicas that there are, as the coordinator knows them: each checks in once in a while. Pure."""

from __future__ import annotations

from dataclasses import dataclass

AWAY_S = 5.0
"""A replica that has not checked in for so long is gone."""


@dataclass(slots=True)
class _Replica:
    seen_at: float
    running: int
    refuses: bool
    """Whether it has been told that the server stops, before it counted."""


class Crew:
    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}

    def check_in(self, name: str, running: int, now: float) -> None:
        """`running`: number of requests that the replica runs."""
        known = self._replicas.get(name)
        told = known is not None and known.refuses
        self._replicas[name] = _Replica(seen_at=now, running=running, refuses=told)

    def told(self, name: str) -> None:
        """The replica is told that the server stops; what it reports from now on is all that it will ever run."""
        if name in self._replicas:
            self._replicas[name].refuses = True

    def check_out(self, name: str, now: float) -> int:
        """The replica ends. Returns how many others there are."""
        self._replicas.pop(name, None)
        return len(self._present(now))

    def left(self, now: float) -> int:
        """Number of requests that run while the server stops. A replica that does not know it yet counts as busy."""
        return sum(replica.running if replica.refuses else max(1, replica.running) for replica in self._present(now))

    def _present(self, now: float) -> list[_Replica]:
        self._replicas = {n: replica for n, replica in self._replicas.items() if now - replica.seen_at < AWAY_S}
        return list(self._replicas.values())
