"""Owns the handles of the actors that the coordinator makes; makes these actors, finds them again and ends them.

Other modules decide when to do so. The standby is a worker's process that has imported everything and has nothing to
load yet. It becomes the next worker, which then starts some seconds sooner.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from elastic_moe.actors import liveness
from elastic_moe.actors.coordinator.fleet import Fleet
from elastic_moe.actors.coordinator.migrator import Migrator
from elastic_moe.actors.engine.engine import Engine
from elastic_moe.actors.remote.ask import Remote, ask
from elastic_moe.actors.remote.calls import CALL_ERRORS, one_line, within
from elastic_moe.actors.worker.worker_actor import WorkerActor
from elastic_moe.cluster.facts.events import EngineLost, Event, WorkerLost
from elastic_moe.cluster.facts.membership import WorkerRecord
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, WorkerInfo
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.placement import WorkerId

logger = logging.getLogger(__name__)


class Processes:
    def __init__(self, fleet: Fleet, expert_bytes: int) -> None:
        self._fleet = fleet
        self._expert_bytes = expert_bytes
        self.workers: dict[WorkerId, Remote[WorkerActor]] = {}
        """Handles of the workers that were started and not stopped."""
        self.doors: dict[WorkerId, Endpoint] = {}
        """Where each loaded worker takes steps, for as long as its process lives."""
        self.engine: Remote[Engine] | None = None
        self.engine_serves = False
        """Whether the engine has begun an epoch. Before that, a late answer does not mean that it hangs."""
        self.migrator: Remote[Migrator] | None = None
        self._standby: tuple[WorkerId, Remote[WorkerActor]] | None = None
        self.standby: tuple[WorkerId, int] | None = None
        """The name and process id of the standby, once it is ready."""

    def adopt(self, members: Iterable[WorkerRecord]) -> list[Event]:
        """Take over the actors of an earlier coordinator. The events name the actors that are gone too."""
        events: list[Event] = []
        for record in members:
            if not record.loaded:
                continue
            worker = self._fleet.find_worker(record.id)
            if worker is None:
                events.append(WorkerLost(worker=record.id, reason="its process died"))
                continue
            self.workers[record.id] = worker
            if record.info is not None:
                self.doors[record.id] = record.info.endpoint
        self.migrator = self._fleet.find_migrator()
        self.engine = self._fleet.find_engine()
        self.engine_serves = True
        if self.engine is None:
            events.append(EngineLost(reason="its process died"))
        return events

    # --- Workers ------------------------------------------------------------------------------------------------

    def start_worker(self, worker: WorkerId, node: str | None = None) -> tuple[Remote[WorkerActor], bool]:
        """The worker's actor, new or made by an earlier coordinator, and whether it was the standby.

        node: where a new one is to run if there is room.
        """
        standby, self._standby, self.standby = self._standby, None, None
        actor = self._find_or_start(worker, node)
        self.workers[worker] = actor
        return actor, standby == (worker, actor)

    def stop_worker(self, worker: WorkerId, info: WorkerInfo | None) -> None:
        """End a worker's process. info: the worker's report; None if it has not loaded."""
        self.doors.pop(worker, None)
        actor = self.workers.pop(worker, None)
        if actor is not None:
            self._fleet.kill_worker(actor, info)

    def workers_of(self, spec: EpochSpec) -> dict[WorkerId, Remote[WorkerActor]]:
        """The actors of the epoch's workers, in rank order. Raises KeyError if one of them has been stopped."""
        return {worker.id: self.workers[worker.id] for worker in spec.placement.workers}

    def present(self, workers: Iterable[WorkerId]) -> dict[WorkerId, Remote[WorkerActor]]:
        """Those of `workers` that have not been stopped."""
        return {worker: self.workers[worker] for worker in workers if worker in self.workers}

    def _find_or_start(self, worker: WorkerId, node: str | None = None) -> Remote[WorkerActor]:
        return self._fleet.find_worker(worker) or self._fleet.start_worker(worker, node)

    @property
    def wants_standby(self) -> bool:
        return self._fleet.standby and self._standby is None

    async def start_standby(self, worker: WorkerId) -> None:
        """Start the process of `worker`, the next worker, ahead of need. Returns once it is ready or has died."""
        actor = self._find_or_start(worker)
        self._standby = (worker, actor)
        try:
            pid = await within(ask(actor, WorkerActor.warm_up), liveness.STANDBY_TIMEOUT_S)
        except CALL_ERRORS as error:
            if self._standby == (worker, actor):
                logger.warning("the standby process has failed and is ended: %s", one_line(error))
                self._fleet.kill(actor)
                self._standby = None
        else:
            if self._standby == (worker, actor):
                self.standby = (worker, pid)

    # --- Engine and migrator ------------------------------------------------------------------------------------

    def ensure_engine(self) -> Remote[Engine]:
        if self.engine is None:
            self.engine = self._fleet.start_engine()
            self.engine_serves = False
        return self.engine

    def drop_engine(self, engine: Remote[Engine], reason: str) -> EngineLost | None:
        """End the engine's process; the next commit starts another. Returns None if that has been done already."""
        if engine != self.engine:
            return None
        self._fleet.kill(engine)
        self.engine = None
        return EngineLost(reason=reason)

    async def engine_epoch(self) -> Epoch | None:
        """The epoch in force at the engine; None if the engine does not answer."""
        if self.engine is None:
            return None
        try:
            status = await within(ask(self.engine, Engine.status), liveness.PROBE_TIMEOUT_S)
        except CALL_ERRORS:
            return None
        return Epoch(status.epoch)

    def ensure_migrator(self) -> Remote[Migrator]:
        if self.migrator is None:
            self.migrator = self._fleet.start_migrator(self._expert_bytes)
        return self.migrator

    def drop_migrator(self, migrator: Remote[Migrator]) -> None:
        self._fleet.kill(migrator)
        if self.migrator == migrator:
            self.migrator = None

    def kill_all(self) -> None:
        standby = None if self._standby is None else self._standby[1]
        for actor in (self.engine, self.migrator, standby, *self.workers.values()):
            if actor is not None:
                self._fleet.kill(actor)
        self.engine = self.migrator = self._standby = None
        self.workers.clear()
        self.doors.clear()
