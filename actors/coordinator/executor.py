"""Carries out the control plane's commands on the actors, and returns the outcomes as events.

Every decision is in cluster/control/state.py, and every handle in actors/coordinator/processes.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from typing import Any

from elastic_moe.actors import liveness
from elastic_moe.actors.coordinator.fleet import Fleet
from elastic_moe.actors.coordinator.polling import RollCall
from elastic_moe.actors.coordinator.processes import Processes
from elastic_moe.actors.coordinator.transferring import Transferring
from elastic_moe.actors.engine.engine import Engine
from elastic_moe.actors.remote.ask import Remote, ask
from elastic_moe.actors.remote.background import Background
from elastic_moe.actors.remote.calls import CALL_ERRORS, Turns, call_all, call_until_error, is_death, one_line, within
from elastic_moe.actors.worker.worker_actor import WorkerActor
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import StepAborted, UserError
from elastic_moe.cluster.facts.events import (
    Abandon,
    AbortSteps,
    Commit,
    CommitFailed,
    Committed,
    Drain,
    Event,
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
from elastic_moe.cluster.messages.epochs import EpochSpec, ModelInfo, ModelSpec, TransportKind, WorkerSpec
from elastic_moe.cluster.messages.requests import Endpoint

logger = logging.getLogger(__name__)


class Executor:
    def __init__(
        self,
        fleet: Fleet,
        config: ServeConfig,
        model: ModelInfo,
        spec: ModelSpec,
        processes: Processes,
        roll_call: RollCall,
    ) -> None:
        self._fleet = fleet
        self._config = config
        self._model = model
        self._spec = spec
        self._processes = processes
        self._roll_call = roll_call
        self._transferring = Transferring(processes)
        self._turns = Turns()
        self._abandoning = Background(_has_failed)
        self._notifying = Background(_has_failed)

    def configure(self, config: ServeConfig) -> None:
        """Use the settings of a redeploy from now on."""
        self._config = config

    # --- Workers ------------------------------------------------------------------------------------------------

    async def start_worker(self, command: StartWorker) -> list[Event]:
        worker = command.worker
        await self._turns.take()
        actor, was_standby = self._processes.start_worker(worker, command.node)
        if was_standby and (lost := await self._roll_call.find_silent([worker])):
            return [*lost]
        # the engine's process takes seconds to start, so it starts before it is needed
        self._processes.ensure_engine()
        try:
            # how many nodes there are to share is known once the process has its place; it may wait long for that
            await ask(actor, WorkerActor.load_progress)
            info = await ask(actor, WorkerActor.load, await asyncio.to_thread(self._worker_spec, command))
        except CALL_ERRORS as error:
            if is_death(error):
                return [WorkerLost(worker=worker, reason=one_line(error))]
            return [WorkerFailed(worker=worker, reason=one_line(error), fatal=isinstance(error, UserError))]
        if info.fit is not None:
            logger.info("%s is served by %s", info.worker, info.fit.text())
        self._processes.doors[worker] = info.endpoint
        return [WorkerLoaded(info=info)]

    def _worker_spec(self, command: StartWorker) -> WorkerSpec:
        config = self._config
        groups = self._fleet.num_groups(config.data_parallel_size)
        return WorkerSpec(
            worker=command.worker,
            model=self._spec,
            experts=command.experts,
            kv_cache_bytes=config.kv_cache_memory_bytes,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            **self._threads(groups),
            node_workers=self._of_a_node(groups * config.most_workers),
            gpu_workers=self._fleet.gpu_workers,
            expert_memory_bytes=config.expert_memory_bytes,
            host_expert_memory_bytes=config.host_expert_memory_bytes,
            expert_cache_dir=config.expert_cache_dir,
            expert_cache_policy=config.expert_cache_policy,
            enforce_eager=config.enforce_eager,
            interface=config.interface,
            step_timeout_s=config.step_timeout,
            enable_prefix_caching=config.enable_prefix_caching,
        )

    def _of_a_node(self, number: int) -> int:
        """As many of `number` as a node has where they are spread evenly."""
        return -(-number // self._fleet.num_nodes)

    def _threads(self, groups: int) -> dict[str, int]:
        """The cores of a node are divided among the groups that there are when a worker starts, and among the workers
        of its group by each epoch."""
        if self._spec.device == "cuda":
            return {"num_threads": 0}
        threads = self._fleet.node_threads()
        own = max(1, threads // self._of_a_node(groups * self._config.workers))
        return {"num_threads": own, "node_threads": max(1, threads // self._of_a_node(groups))}

    async def probe(self, command: Probe) -> list[Event]:
        lost = await self._roll_call.find_lost(command.workers)
        return [Probed(lost=tuple((event.worker, event.reason) for event in lost))]

    # --- The life of a change -----------------------------------------------------------------------------------

    async def transfer(self, command: Transfer) -> list[Event]:
        self._transferring.supersede(command.epoch)
        await self._settle()
        report, read, errors = await self._transferring.bring(command)
        nbytes = report.nbytes + len(read) * self._model.expert_bytes
        if not errors:
            return [TransferDone(epoch=command.epoch, nbytes=nbytes)]
        workers = {move.source for move in command.copies} | {move.target for move in command.copies}
        lost = await self._roll_call.find_lost(workers | {worker for worker, _, _ in command.reads})
        staged = (*((move.target, move.layer, move.expert) for move in report.done), *read)
        failed = TransferFailed(epoch=command.epoch, reason="; ".join(errors), staged=staged, nbytes=nbytes)
        return [*lost, failed]

    async def prepare(self, command: Prepare) -> list[Event]:
        spec = command.spec
        await self._settle()
        try:
            workers = self._processes.workers_of(spec)
            if command.forms_group:
                spec = await self._open_rendezvous(spec)
            calls: dict[str, Awaitable[Any]] = {}
            for worker, actor in workers.items():
                await self._turns.take()
                calls[worker] = ask(actor, WorkerActor.prepare, spec)
            if command.forms_group:
                calls["engine"] = self._reach(command)
            errors = await call_until_error(calls, self._config.step_timeout)
        except KeyError as error:
            return [PrepareFailed(epoch=spec.epoch, reason=f"worker {error} is gone")]
        except CALL_ERRORS as error:
            lost = await self._roll_call.find_lost([worker.id for worker in spec.placement.workers])
            return [*lost, PrepareFailed(epoch=spec.epoch, reason=f"no rendezvous: {one_line(error)}")]
        if not errors:
            return [Prepared(spec=spec)]
        lost = await self._roll_call.find_lost(workers)
        return [*lost, PrepareFailed(epoch=spec.epoch, reason=describe_errors(errors))]

    async def _reach(self, command: Prepare) -> None:
        """Raises StepAborted if the engine cannot reach a worker. What else is wrong with it, the commit will show."""
        endpoints = {worker: info.endpoint for worker, info in command.infos.items()}
        try:
            await within(ask(self._processes.ensure_engine(), Engine.reach, endpoints), liveness.DOOR_S)
        except CALL_ERRORS as error:
            if isinstance(error, StepAborted):
                raise

    async def _open_rendezvous(self, spec: EpochSpec) -> EpochSpec:
        """`spec`, with the places where its workers meet, if its transport needs some. Raises CALL_ERRORS."""
        workers = self._processes.workers_of(spec)
        if spec.transport is TransportKind.NCCL:
            first = next(iter(workers.values()))
            return replace(spec, rendezvous=await within(ask(first, WorkerActor.rendezvous), liveness.DOOR_S))
        if spec.transport in (TransportKind.TCP, TransportKind.IPC):
            calls = [self._open_door(worker) for worker in workers.values()]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
            return replace(spec, doors=tuple(answer for answer in answers if isinstance(answer, Endpoint)))
        return spec

    async def _open_door(self, worker: Remote[WorkerActor]) -> Endpoint:
        await self._turns.take()
        return await within(ask(worker, WorkerActor.open_door), liveness.DOOR_S)

    async def commit(self, command: Commit) -> list[Event]:
        spec, processes = command.spec, self._processes
        engine = processes.ensure_engine()
        try:
            moved_requests = await self._flip(engine, command)
        except KeyError as error:
            return [CommitFailed(epoch=spec.epoch, reason=f"worker {error} is gone")]
        except CALL_ERRORS as error:
            if is_death(error) or isinstance(error, TimeoutError):
                gone = processes.drop_engine(engine, one_line(error))
                return [gone or CommitFailed(epoch=spec.epoch, reason="the engine was lost during the commit")]
            # a worker whose step hangs has not begun the epoch, although its process answers
            lost = await self._roll_call.find_lost([worker.id for worker in spec.placement.workers], stepping=True)
            return [*lost, CommitFailed(epoch=spec.epoch, reason=one_line(error))]
        processes.engine_serves = True
        # the migrator's process takes seconds to start too, and no transfer waits for it yet
        processes.ensure_migrator()
        return [Committed(epoch=spec.epoch, moved_requests=moved_requests)]

    async def _flip(self, engine: Remote[Engine], command: Commit) -> int:
        """Have the engine begin the epoch. Returns the number of requests that had to leave their worker.

        Raises KeyError if a worker of the epoch has been stopped.
        """
        processes, spec = self._processes, command.spec
        workers, infos = processes.workers_of(spec), dict(command.infos)
        call = ask(engine, Engine.change_epoch, self._model, spec, workers, infos)
        timeout_s = liveness.COMMIT_STEPS * self._config.step_timeout + liveness.COMMIT_MARGIN_S
        return await within(call, timeout_s)

    # --- Without an answer --------------------------------------------------------------------------------------

    def abort_steps(self, command: AbortSteps) -> None:
        calls = {
            (worker, epoch): ask(actor, WorkerActor.abort_step, epoch)
            for worker, actor in self._processes.present(command.workers).items()
            for epoch in command.epochs
        }
        self._notify(calls, self._notifying)

    def stop_worker(self, command: StopWorker) -> None:
        engine = self._processes.engine
        if engine is not None:
            self._notify({"engine": ask(engine, Engine.lose, command.worker)}, self._notifying)
        self._processes.stop_worker(command.worker, command.info)

    def drain(self, command: Drain) -> None:
        engine = self._processes.engine
        if engine is not None:
            # if this engine is gone by then, its successor gets a command of its own
            self._notify({"engine": ask(engine, Engine.drain, command.workers)}, self._notifying)

    def abandon(self, command: Abandon) -> None:
        workers = self._processes.present(command.workers)
        calls = {worker: ask(actor, WorkerActor.abandon, command.epoch) for worker, actor in workers.items()}
        self._notify(calls, self._abandoning)

    def _notify(self, calls: Mapping[Any, Any], tasks: Background) -> None:
        tasks.start(_told(calls))

    async def _settle(self) -> None:
        """Wait until earlier epochs are abandoned: a worker that does so late would drop newly brought experts."""
        await self._abandoning.settle()


async def _told(calls: Mapping[Any, Any]) -> None:
    await call_all(calls, liveness.NOTIFY_TIMEOUT_S)


def _has_failed(error: BaseException) -> None:
    logger.error("a message to workers or to the engine could not be sent", exc_info=error)


def describe_errors(errors: Mapping[str, BaseException]) -> str:
    return "; ".join(f"{worker}: {one_line(error)}" for worker, error in errors.items())
