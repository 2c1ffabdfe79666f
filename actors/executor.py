"""Carries out the control plane's commands on the actors; what comes of them goes back as events.

Holds the actors' handles and nothing else that lasts: every decision is in cluster/state.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from actors import names
from actors.calls import CALL_ERRORS, call_all, call_until_error, is_death, one_line, sign_of_life
from actors.fleet import Fleet
from actors.migrator import MigrationReport
from cluster.config import ServeConfig
from cluster.errors import UserError
from cluster.events import (
    Abandon,
    AbortSteps,
    Commit,
    CommitFailed,
    Committed,
    Drain,
    EngineLost,
    Event,
    ExpertKey,
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Probed,
    StartWorker,
    StopWorker,
    Transfer,
    TransferDone,
    TransferFailed,
    WorkerFailed,
    WorkerLoaded,
    WorkerLost,
)
from cluster.membership import Member
from cluster.placement import WorkerId
from cluster.protocol import EngineStatus, Epoch, EpochSpec, HostInfo, HostSpec, ModelInfo, ModelSpec

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5.0
"""A worker that gives no sign of life for so long hangs."""
SUSPECT_TIMEOUT_S = 2.0
"""The same for one whose step is late, or that waited to be used."""
SPARE_TIMEOUT_S = 60.0
READ_AT_ONCE = 16
"""Experts that a worker reads by one call; between two, it can be told of another change."""
ABANDON_TIMEOUT_S = 10.0

Hosts = Mapping[WorkerId, Any]


class Executor:
    def __init__(self, fleet: Fleet, config: ServeConfig, model: ModelInfo, spec: ModelSpec) -> None:
        self._fleet = fleet
        self._config = config
        self._model = model
        self._spec = spec
        self.hosts: dict[WorkerId, Any] = {}
        """Handles of the workers that were started and not stopped."""
        self.infos: dict[WorkerId, HostInfo] = {}
        self._spare: tuple[WorkerId, Any] | None = None
        """The next worker's host, which has not been told to load."""
        self.standby: tuple[WorkerId, int] | None = None
        """Its process id, once it is ready."""
        self.engine: Any = None
        self._engine_started = False
        self.engine_serves = False
        """Whether it has begun an epoch; before that it may take its time to answer."""
        self._migrator: Any = None
        self._transferring: Epoch | None = None
        self._abandoning: set[asyncio.Task[Any]] = set()
        self._telling: set[asyncio.Task[Any]] = set()

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
            if member.info is not None:
                self.infos[member.id] = member.info
        self._migrator = self._fleet.find(names.MIGRATOR)
        self.engine = self._fleet.find(names.ENGINE)
        self._engine_started = self.engine_serves = True
        if self.engine is None:
            events.append(EngineLost(reason="its process died"))
        return events

    async def engine_epoch(self) -> Epoch | None:
        """The epoch of the engine's last step; None where it does not say."""
        if self.engine is None:
            return None
        try:
            status: EngineStatus = await asyncio.wait_for(self.engine.status.remote(), PROBE_TIMEOUT_S)
        except CALL_ERRORS:
            return None
        return Epoch(status.epoch)

    async def start_worker(self, command: StartWorker) -> Event:
        # one that waits for this, or that a coordinator before this one has made and which goes on loading
        spare, self._spare, self.standby = self._spare, None, None
        host = self._find_or_start(command.worker)
        self.hosts[command.worker] = host
        if spare == (command.worker, host) and (lost := await self.find_silent([command.worker])):
            return lost[0]
        # its process takes seconds to start: not when it is needed
        self._ensure_engine()
        config = self._config
        spec = HostSpec(
            worker=command.worker,
            model=self._spec,
            experts=command.experts,
            kv_cache_bytes=config.kv_cache_memory_bytes,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            **self._threads(),
            node_workers=-(-config.most_workers // self._fleet.num_nodes),
            expert_memory_bytes=config.expert_memory_bytes,
            step_timeout_s=config.step_timeout,
        )
        try:
            info: HostInfo = await host.load.remote(spec)
        except CALL_ERRORS as error:
            if is_death(error):
                return WorkerLost(worker=command.worker, reason=one_line(error))
            return WorkerFailed(worker=command.worker, reason=one_line(error), fatal=isinstance(error, UserError))
        self.infos[command.worker] = info
        if info.fit is not None:
            logger.info("%s is served by %s", info.worker, info.fit.text())
        return WorkerLoaded(info=info)

    def _find_or_start(self, worker: WorkerId) -> Any:
        return self._fleet.find(names.host_name(worker)) or self._fleet.start_host(worker)

    @property
    def wants_spare(self) -> bool:
        return self._fleet.standby and self._spare is None

    async def start_spare(self, worker: WorkerId) -> None:
        """Have a process ready that will be `worker`, the next one. Returns once it is, or has died."""
        host = self._find_or_start(worker)
        self._spare = (worker, host)
        try:
            pid = await asyncio.wait_for(host.warm_up.remote(), SPARE_TIMEOUT_S)
        except CALL_ERRORS as error:
            if self._spare == (worker, host):
                logger.warning("the spare process is given up: %s", one_line(error))
                self._fleet.kill(host)
                self._spare = None
        else:
            if self._spare == (worker, host):
                self.standby = (worker, pid)

    def _threads(self) -> dict[str, int]:
        if self._spec.device == "cuda":
            return {"num_threads": 0}
        threads = self._fleet.node_threads()
        beside = -(-self._config.workers // self._fleet.num_nodes)
        return {"num_threads": max(1, threads // beside), "node_threads": threads}

    def stop_worker(self, command: StopWorker) -> None:
        host = self.hosts.pop(command.worker, None)
        info = self.infos.pop(command.worker, None)
        if host is not None:
            self._fleet.kill_host(host, info)

    async def transfer(self, command: Transfer) -> list[Event]:
        """Copies and reads side by side. A later command takes this one's place: it stops before its next expert."""
        self._transferring = command.epoch
        await self._settle()
        report, (read, failed) = await asyncio.gather(self._copy(command), self._read(command))
        staged = (*((move.target, move.layer, move.expert) for move in report.done), *read)
        errors = [error for error in (report.error, failed) if error is not None]
        nbytes = report.nbytes + len(read) * self._model.expert_bytes
        if not errors:
            return [TransferDone(epoch=command.epoch, nbytes=nbytes)]
        workers = {move.source for move in command.copies} | {move.target for move in command.copies}
        lost = await self._find_lost(workers | {key[0] for key in command.reads})
        return [
            *lost,
            TransferFailed(epoch=command.epoch, reason="; ".join(errors), staged=staged, nbytes=nbytes),
        ]

    async def _copy(self, command: Transfer) -> MigrationReport:
        if not command.copies:
            return MigrationReport(done=(), nbytes=0, seconds=0.0)
        self._ensure_migrator()
        wanted = {move.source for move in command.copies} | {move.target for move in command.copies}
        hosts = {worker: host for worker, host in self.hosts.items() if worker in wanted}
        if len(hosts) < len(wanted):
            return MigrationReport(done=(), nbytes=0, seconds=0.0, error="a worker is gone")
        copying = asyncio.ensure_future(self._migrator.copy.remote(command.copies, hosts, command.urgent))
        try:
            await self._watch_migrator(self._migrator, copying)
            report: MigrationReport = copying.result()
        except CALL_ERRORS as error:
            return MigrationReport(done=(), nbytes=0, seconds=0.0, error=f"the migrator failed: {one_line(error)}")
        rate = report.nbytes / max(report.seconds, 1e-9) / 1e6
        logger.info("epoch %d: %d experts copied in %.2f s (%.0f MB/s)", command.epoch, len(report.done),
                    report.seconds, rate)  # fmt: skip
        return report

    async def _watch_migrator(self, migrator: Any, copying: asyncio.Future[MigrationReport]) -> None:
        """Until the copies are made, however long they take. Raises TimeoutError where it hangs, and ends it then."""
        while not copying.done():
            await asyncio.wait([copying], timeout=PROBE_TIMEOUT_S)
            if copying.done():
                return
            try:
                await asyncio.wait_for(migrator.ping.remote(), PROBE_TIMEOUT_S)
            except TimeoutError:
                copying.cancel()
                self._fleet.kill(migrator)
                if self._migrator is migrator:
                    self._migrator = None
                raise

    async def _read(self, command: Transfer) -> tuple[list[ExpertKey], str | None]:
        """(what was read, the first error). Workers read side by side, each a few experts at a time."""
        done: list[ExpertKey] = []
        errors: list[str] = []

        async def read_all(worker: WorkerId) -> None:
            keys = [key for key in command.reads if key[0] == worker]
            for begin in range(0, len(keys), READ_AT_ONCE):
                part = keys[begin : begin + READ_AT_ONCE]
                if errors or self._transferring != command.epoch:
                    return
                try:
                    await self.hosts[worker].read_experts.remote([(layer, expert) for _, layer, expert in part])
                except KeyError:
                    errors.append(f"{worker} is gone")
                except CALL_ERRORS as error:
                    errors.append(f"{worker} reading {len(part)} experts of the checkpoint: {one_line(error)}")
                else:
                    done.extend(part)

        await asyncio.gather(*(read_all(worker) for worker in {key[0] for key in command.reads}))
        return done, errors[0] if errors else None

    async def prepare(self, command: Prepare) -> list[Event]:
        spec = command.spec
        await self._settle()
        try:
            hosts = self._hosts_of(spec)
            if command.forms_group and spec.transport in ("gloo", "nccl"):
                first = spec.placement.workers[0].id
                address = await asyncio.wait_for(hosts[first].rendezvous.remote(), self._config.step_timeout)
                spec = replace(spec, rendezvous=address)
            errors = await call_until_error(
                {worker: host.prepare.remote(spec) for worker, host in hosts.items()}, self._config.step_timeout
            )
        except KeyError as error:
            return [PrepareFailed(epoch=spec.epoch, reason=f"{error} is gone")]
        except CALL_ERRORS as error:
            lost = await self._find_lost([worker.id for worker in spec.placement.workers])
            return [*lost, PrepareFailed(epoch=spec.epoch, reason=f"no rendezvous: {one_line(error)}")]
        if not errors:
            return [Prepared(spec=spec)]
        lost = await self._find_lost(hosts)
        return [*lost, PrepareFailed(epoch=spec.epoch, reason=_told(errors))]

    async def commit(self, command: Commit) -> list[Event]:
        spec = command.spec
        self._ensure_engine()
        engine, first = self.engine, not self._engine_started
        try:
            hosts = self._hosts_of(spec)
            infos = {worker: self.infos[worker] for worker in hosts}
            if first:
                call = engine.start.remote(self._model, spec, hosts, infos)
            else:
                call = engine.change_epoch.remote(spec, hosts, infos)
            self._engine_started = True
            # a step that hangs comes first, then hosts that do
            moved_requests: int = await asyncio.wait_for(call, 2 * self._config.step_timeout + 30)
        except KeyError as error:
            return [CommitFailed(epoch=spec.epoch, reason=f"{error} is gone")]
        except CALL_ERRORS as error:
            if is_death(error) or isinstance(error, TimeoutError):
                gone = self.drop_engine(engine, one_line(error))
                return [gone or CommitFailed(epoch=spec.epoch, reason="the engine was lost meanwhile")]
            # a host whose step hangs has not flipped, although its process answers
            lost = await self._find_lost([worker.id for worker in spec.placement.workers], stepping=True)
            return [*lost, CommitFailed(epoch=spec.epoch, reason=one_line(error))]
        self.engine_serves = True
        # as the engine's, but nobody waits for this one yet
        self._ensure_migrator()
        return [Committed(epoch=spec.epoch, moved_requests=moved_requests)]

    def abort_steps(self, command: AbortSteps) -> None:
        hosts = [self.hosts[worker] for worker in command.workers if worker in self.hosts]
        calls = {(n, epoch): host.abort_step.remote(epoch) for n, host in enumerate(hosts) for epoch in command.epochs}
        self._tell(calls, self._telling)

    def drain(self, command: Drain) -> None:
        if self.engine is not None:
            # an engine that is gone by then will be told by another command
            self._tell({"engine": self.engine.drain.remote(command.workers)}, self._telling)

    def abandon(self, command: Abandon) -> None:
        calls = {w: self.hosts[w].abandon.remote(command.epoch) for w in command.workers if w in self.hosts}
        self._tell(calls, self._abandoning)

    def _tell(self, calls: Mapping[Any, Any], tasks: set[asyncio.Task[Any]]) -> None:
        task = asyncio.ensure_future(call_all(calls, ABANDON_TIMEOUT_S))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def probe(self, command: Probe) -> Event:
        lost = await self._find_lost(command.workers)
        return Probed(lost=tuple((event.worker, event.reason) for event in lost))

    def _ensure_engine(self) -> None:
        if self.engine is None:
            self.engine = self._fleet.start_engine()
            self._engine_started = self.engine_serves = False

    def _ensure_migrator(self) -> None:
        if self._migrator is None:
            self._migrator = self._fleet.start_migrator(self._model.expert_bytes)

    def drop_engine(self, engine: Any, reason: str) -> EngineLost | None:
        """Make sure that it is gone; the next commit starts another. None where that has been done already."""
        if engine is not self.engine:
            return None
        self._fleet.kill(engine)
        self.engine = None
        return EngineLost(reason=reason)

    def kill_all(self) -> None:
        spare = None if self._spare is None else self._spare[1]
        for actor in (self.engine, self._migrator, spare, *self.hosts.values()):
            if actor is not None:
                self._fleet.kill(actor)
        self.engine = self._migrator = self._spare = None
        self.hosts.clear()

    async def find_silent(self, workers: Iterable[WorkerId]) -> list[WorkerLost]:
        """Like `_find_lost`, with less patience: there is another sign already that they might hang."""
        return await self._without_answer(workers, lambda host: sign_of_life(host.ping, SUSPECT_TIMEOUT_S))

    async def _find_lost(self, workers: Iterable[WorkerId], *, stepping: bool = False) -> list[WorkerLost]:
        """Those that do not answer: dead, or hanging. `stepping`: the thread that runs the steps has to."""
        return await self._without_answer(
            workers, lambda host: host.ping_step.remote() if stepping else host.ping.remote()
        )

    async def _without_answer(
        self, workers: Iterable[WorkerId], ask: Callable[[Any], Awaitable[Any]]
    ) -> list[WorkerLost]:
        calls = {worker: ask(self.hosts[worker]) for worker in workers if worker in self.hosts}
        errors = await call_all(calls, self._config.heartbeat_timeout)
        return [WorkerLost(worker=worker, reason=one_line(error)) for worker, error in errors.items()]

    async def _settle(self) -> None:
        """Wait for what was told before: a host that abandons an epoch late would drop what is brought next."""
        if self._abandoning:
            await asyncio.gather(*self._abandoning)

    def _hosts_of(self, spec: EpochSpec) -> dict[WorkerId, Any]:
        """In rank order. Raises KeyError for one that has been stopped."""
        return {worker.id: self.hosts[worker.id] for worker in spec.placement.workers}


def _told(errors: Mapping[WorkerId, BaseException]) -> str:
    return "; ".join(f"{worker}: {one_line(error)}" for worker, error in errors.items())
