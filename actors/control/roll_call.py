"""Asks workers whether they live, when there is a reason to: those that do not answer in time are lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from elastic_moe.actors import liveness
from elastic_moe.actors.control.processes import Processes
from elastic_moe.actors.remote.calls import call_all, one_line, sign_of_life
from elastic_moe.cluster.facts.events import WorkerLost
from elastic_moe.cluster.placement import WorkerId


class RollCall:
    def __init__(self, processes: Processes, heartbeat_timeout_s: float) -> None:
        self._processes = processes
        self._timeout_s = heartbeat_timeout_s

    async def find_lost(self, workers: Iterable[WorkerId], *, stepping: bool = False) -> list[WorkerLost]:
        """Those that are dead or hang. stepping: the thread that runs the steps has to answer."""
        return await self._ask(workers, lambda host: host.ping_step.remote() if stepping else host.ping.remote())

    async def find_silent(self, workers: Iterable[WorkerId]) -> list[WorkerLost]:
        """The same with less patience, where there is another sign already that they might hang."""
        return await self._ask(workers, lambda host: sign_of_life(host.ping, liveness.SUSPECT_TIMEOUT_S))

    async def _ask(self, workers: Iterable[WorkerId], ask: Callable[[Any], Awaitable[Any]]) -> list[WorkerLost]:
        hosts = self._processes.hosts
        calls = {worker: ask(hosts[worker]) for worker in workers if worker in hosts}
        errors = await call_all(calls, self._timeout_s)
        return [WorkerLost(worker=worker, reason=one_line(error)) for worker, error in errors.items()]
