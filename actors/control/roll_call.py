"""Pings workers when there is a reason to doubt them. A worker that does not answer in time is lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from elastic_moe.actors import liveness
from elastic_moe.actors.control.processes import Processes
from elastic_moe.actors.remote.ask import Remote, ask
from elastic_moe.actors.remote.calls import call_all, one_line, sign_of_life
from elastic_moe.actors.worker.worker_actor import WorkerActor
from elastic_moe.cluster.facts.events import WorkerLost
from elastic_moe.cluster.placement import WorkerId


class RollCall:
    def __init__(self, processes: Processes, heartbeat_timeout_s: float) -> None:
        self._processes = processes
        self._timeout_s = heartbeat_timeout_s

    async def find_lost(self, workers: Iterable[WorkerId], *, stepping: bool = False) -> list[WorkerLost]:
        """The workers that are dead or hang. stepping: the thread that runs the steps has to answer."""
        ping = WorkerActor.ping_step if stepping else WorkerActor.ping
        return await self._call(workers, lambda actor: ask(actor, ping))

    async def find_silent(self, workers: Iterable[WorkerId]) -> list[WorkerLost]:
        """As `find_lost`, with a shorter time-out, for workers that another sign already makes suspect."""

        def ping(actor: Remote[WorkerActor]) -> Awaitable[None]:
            return sign_of_life(lambda: ask(actor, WorkerActor.ping), liveness.SUSPECT_TIMEOUT_S)

        return await self._call(workers, ping)

    async def _call(
        self, workers: Iterable[WorkerId], ping: Callable[[Remote[WorkerActor]], Awaitable[None]]
    ) -> list[WorkerLost]:
        calls = {worker: ping(actor) for worker, actor in self._processes.present(workers).items()}
        errors = await call_all(calls, self._timeout_s)
        return [WorkerLost(worker=worker, reason=one_line(error)) for worker, error in errors.items()]
