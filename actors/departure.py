"""How a cluster ends: its API replicas refuse new requests, and it waits until those that they run have ended.

A server that stops does so, and so does a cluster that gives way to the next one (cluster/control/succession.py). Owned
by the coordinator, on whose event loop everything here runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from elastic_moe.actors import liveness
from elastic_moe.actors.crew import Crew
from elastic_moe.cluster.control.succession import Succession
from elastic_moe.cluster.facts.facts import Choice

logger = logging.getLogger(__name__)


class Departure:
    def __init__(self, replicas: int) -> None:
        """`replicas`: number of API replicas that the server has."""
        self.crew = Crew(replicas)
        self._succession = Succession()
        self._stopping = asyncio.Event()
        """Set when the API replicas are to refuse new requests."""

    async def check_in(self, replica: str, running: int, refuses: bool, now: float) -> bool:
        """Count an API replica's requests. Returns whether it must refuse new ones: at once if so, and else after
        CHECK_IN_S."""
        self.crew.check_in(replica, running, refuses, now)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(liveness.CHECK_IN_S):
                await self._stopping.wait()
        return self._stopping.is_set()

    def stop_requests(self, now: float) -> int:
        """Have all API replicas refuse new requests. Returns the number of requests that still run."""
        self._stopping.set()
        return self.crew.left(now)

    @property
    def replaced(self) -> bool:
        """Whether another cluster is the wanted one, as far as `look` has heard."""
        return self._succession.replaced_since is not None

    def give_way(self, now: float) -> None:
        """The next cluster needs the resources of this one."""
        if self._succession.gives_way_since is None:
            logger.warning("another cluster needs the resources of this one, which ends after its last request")
        self._succession.give_way(now)

    def take_back(self) -> None:
        """The cluster is wanted again: it goes on if it was giving way."""
        if self._succession.gives_way_since is not None:
            self._succession = Succession()
            self._stopping.clear()
            self.crew.go_on()

    def look(self, *, replaced: bool, most_s: float, now: float) -> Choice[bool]:
        """Whether the cluster is to end now. `replaced`: another cluster is the wanted one. `most_s`: seconds that its
        requests may take once it gives way."""
        if replaced and self._succession.refuses(now):
            self._stopping.set()
        return self._succession.look(
            replaced=replaced,
            replicas=self.crew.present(now),
            running=1 if self._succession.gives_way_since is None else self.crew.left(now),
            most_s=most_s,
            now=now,
        )
