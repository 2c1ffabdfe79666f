"""The actors that the coordinator makes: their handles, and how they are made, found again and ended.

Whether and when, others decide. The standby is a host that has imported everything and was not told what to load: it
becomes the next worker, which then starts some seconds sooner.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from elastic_moe.actors import liveness, names
from elastic_moe.actors.control.fleet import Fleet
from elastic_moe.actors.remote.calls import CALL_ERRORS, one_line
from elastic_moe.cluster.facts.events import EngineLost, Event, WorkerLost
from elastic_moe.cluster.facts.membership import Member
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, HostInfo
from elastic_moe.cluster.messages.views import EngineStatus
from elastic_moe.cluster.placement import WorkerId

logger = logging.getLogger(__name__)

Hosts = Mapping[WorkerId, Any]


class Processes:
    def __init__(self, fleet: Fleet, expert_bytes: int) -> None:
        self._fleet = fleet
        self._expert_bytes = expert_bytes
        self.hosts: dict[WorkerId, Any] = {}
        """Handles of the workers that were started and not stopped."""
        self.engine: Any = None
        self.engine_started = False
        """Whether it was told to begin its first epoch."""
        self.engine_serves = False
        """Whether it has begun an epoch; before that it may take its time to answer."""
        self.migrator: Any = None
        self._standby: tuple[WorkerId, Any] | None = None
        self.standby: tuple[WorkerId, int] | None = None
        """The next worker and its process id, once it is ready."""

    def adopt(self, members: Iterable[Member]) -> list[Event]:
        """Take over the actors of a coordinator that is gone; the events tell which are gone too."""
        events: list[Event] = []
        for member in members:
            if not member.loaded:
                continue
            host = self._fleet.find(names.host_name(member.id))
            if host is None:
                events.append(WorkerLost(worker=member.id, reason="its process died"))
                continue
            self.hosts[member.id] = host
        self.migrator = self._fleet.find(names.MIGRATOR)
        self.engine = self._fleet.find(names.ENGINE)
        self.engine_started = self.engine_serves = True
        if self.engine is None:
            events.append(EngineLost(reason="its process died"))
        return events

    # --- Workers ------------------------------------------------------------------------------------------------

    def start_worker(self, worker: WorkerId) -> tuple[Any, bool]:
        """(its host, whether that was the standby): a new one, or the one that a coordinator before this one made."""
        standby, self._standby, self.standby = self._standby, None, None
        host = self._find_or_start(worker)
        self.hosts[worker] = host
        return host, standby == (worker, host)

    def stop_worker(self, worker: WorkerId, info: HostInfo | None) -> None:
        """info: what it reported when it had loaded, if it had."""
        host = self.hosts.pop(worker, None)
        if host is not None:
            self._fleet.kill_host(host, info)

    def hosts_of(self, spec: EpochSpec) -> dict[WorkerId, Any]:
        """In rank order. Raises KeyError for one that has been stopped."""
        return {worker.id: self.hosts[worker.id] for worker in spec.placement.workers}

    def _find_or_start(self, worker: WorkerId) -> Any:
        return self._fleet.find(names.host_name(worker)) or self._fleet.start_host(worker)

    @property
    def wants_standby(self) -> bool:
        return self._fleet.standby and self._standby is None

    async def start_standby(self, worker: WorkerId) -> None:
        """Have a process ready that will be `worker`, the next one. Returns once it is, or has died."""
        host = self._find_or_start(worker)
        self._standby = (worker, host)
        try:
            pid = await asyncio.wait_for(host.warm_up.remote(), liveness.STANDBY_TIMEOUT_S)
        except CALL_ERRORS as error:
            if self._standby == (worker, host):
                logger.warning("the standby process is given up: %s", one_line(error))
                self._fleet.kill(host)
                self._standby = None
        else:
            if self._standby == (worker, host):
                self.standby = (worker, pid)

    # --- Engine and migrator ------------------------------------------------------------------------------------

    def ensure_engine(self) -> None:
        if self.engine is None:
            self.engine = self._fleet.start_engine()
            self.engine_started = self.engine_serves = False

    def drop_engine(self, engine: Any, reason: str) -> EngineLost | None:
        """Make sure that it is gone; the next commit starts another. None where that has been done already."""
        if engine is not self.engine:
            return None
        self._fleet.kill(engine)
        self.engine = None
        return EngineLost(reason=reason)

    async def engine_epoch(self) -> Epoch | None:
        """The epoch of the engine's last step; None where it does not say."""
        if self.engine is None:
            return None
        try:
            status: EngineStatus = await asyncio.wait_for(self.engine.status.remote(), liveness.PROBE_TIMEOUT_S)
        except CALL_ERRORS:
            return None
        return Epoch(status.epoch)

    def ensure_migrator(self) -> None:
        if self.migrator is None:
            self.migrator = self._fleet.start_migrator(self._expert_bytes)

    def drop_migrator(self, migrator: Any) -> None:
        self._fleet.kill(migrator)
        if self.migrator is migrator:
            self.migrator = None

    def kill_all(self) -> None:
        standby = None if self._standby is None else self._standby[1]
        for actor in (self.engine, self.migrator, standby, *self.hosts.values()):
            if actor is not None:
                self._fleet.kill(actor)
        self.engine = self.migrator = self._standby = None
        self.hosts.clear()
