"""The actors that the coordinator makes: their handles, and how they are made, found again and ended.

Whether and when, others decide. The standby is a host that has imported everything and was not told what to load: it
becomes the next worker, which then starts some seconds sooner.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from elastic_moe.actors import liveness
from elastic_moe.actors.control.fleet import Fleet
from elastic_moe.actors.control.migrator import Migrator
from elastic_moe.actors.engine.engine import Engine
from elastic_moe.actors.remote.ask import Remote, ask
from elastic_moe.actors.remote.calls import CALL_ERRORS, one_line, within
from elastic_moe.actors.worker.host import ExpertHost
from elastic_moe.cluster.facts.events import EngineLost, Event, WorkerLost
from elastic_moe.cluster.facts.membership import Member
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, HostInfo
from elastic_moe.cluster.placement import WorkerId

logger = logging.getLogger(__name__)


class Processes:
    def __init__(self, fleet: Fleet, expert_bytes: int) -> None:
        self._fleet = fleet
        self._expert_bytes = expert_bytes
        self.workers: dict[WorkerId, Remote[ExpertHost]] = {}
        """Handles of the workers that were started and not stopped."""
        self.engine: Remote[Engine] | None = None
        self.engine_started = False
        """Whether it was told to begin its first epoch."""
        self.engine_serves = False
        """Whether it has begun an epoch; before that it may take its time to answer."""
        self.migrator: Remote[Migrator] | None = None
        self._standby: tuple[WorkerId, Remote[ExpertHost]] | None = None
        self.standby: tuple[WorkerId, int] | None = None
        """The next worker and its process id, once it is ready."""

    def adopt(self, members: Iterable[Member]) -> list[Event]:
        """Take over the actors of a coordinator that is gone; the events tell which are gone too."""
        events: list[Event] = []
        for member in members:
            if not member.loaded:
                continue
            worker = self._fleet.find_worker(member.id)
            if worker is None:
                events.append(WorkerLost(worker=member.id, reason="its process died"))
                continue
            self.workers[member.id] = worker
        self.migrator = self._fleet.find_migrator()
        self.engine = self._fleet.find_engine()
        self.engine_started = self.engine_serves = True
        if self.engine is None:
            events.append(EngineLost(reason="its process died"))
        return events

    # --- Workers ------------------------------------------------------------------------------------------------

    def start_worker(self, worker: WorkerId) -> tuple[Remote[ExpertHost], bool]:
        """(its host, whether that was the standby): a new one, or the one that a coordinator before this one made."""
        standby, self._standby, self.standby = self._standby, None, None
        actor = self._find_or_start(worker)
        self.workers[worker] = actor
        return actor, standby == (worker, actor)

    def stop_worker(self, worker: WorkerId, info: HostInfo | None) -> None:
        """info: what it reported when it had loaded, if it had."""
        actor = self.workers.pop(worker, None)
        if actor is not None:
            self._fleet.kill_worker(actor, info)

    def workers_of(self, spec: EpochSpec) -> dict[WorkerId, Remote[ExpertHost]]:
        """In rank order. Raises KeyError for one that has been stopped."""
        return {worker.id: self.workers[worker.id] for worker in spec.placement.workers}

    def present(self, workers: Iterable[WorkerId]) -> dict[WorkerId, Remote[ExpertHost]]:
        """Those of `workers` that have not been stopped."""
        return {worker: self.workers[worker] for worker in workers if worker in self.workers}

    def _find_or_start(self, worker: WorkerId) -> Remote[ExpertHost]:
        return self._fleet.find_worker(worker) or self._fleet.start_worker(worker)

    @property
    def wants_standby(self) -> bool:
        return self._fleet.standby and self._standby is None

    async def start_standby(self, worker: WorkerId) -> None:
        """Have a process ready that will be `worker`, the next one. Returns once it is, or has died."""
        actor = self._find_or_start(worker)
        self._standby = (worker, actor)
        try:
            pid = await within(ask(actor, ExpertHost.warm_up), liveness.STANDBY_TIMEOUT_S)
        except CALL_ERRORS as error:
            if self._standby == (worker, actor):
                logger.warning("the standby process is given up: %s", one_line(error))
                self._fleet.kill(actor)
                self._standby = None
        else:
            if self._standby == (worker, actor):
                self.standby = (worker, pid)

    # --- Engine and migrator ------------------------------------------------------------------------------------

    def ensure_engine(self) -> Remote[Engine]:
        if self.engine is None:
            self.engine = self._fleet.start_engine()
            self.engine_started = self.engine_serves = False
        return self.engine

    def drop_engine(self, engine: Remote[Engine], reason: str) -> EngineLost | None:
        """Make sure that it is gone; the next commit starts another. None where that has been done already."""
        if engine != self.engine:
            return None
        self._fleet.kill(engine)
        self.engine = None
        return EngineLost(reason=reason)

    async def engine_epoch(self) -> Epoch | None:
        """The epoch of the engine's last step; None where it does not say."""
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
