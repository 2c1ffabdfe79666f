"""Engine: the actor around the queue of requests (actors/scheduler/) and the step loop (step_loop.py).

Workers and API replicas are reached over connections of their own (actors/engine/worker_links.py,
actors/engine/clients.py): Ray is for the control plane.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from elastic_moe.actors import liveness, names
from elastic_moe.actors.engine.clients import Clients
from elastic_moe.actors.engine.step_loop import StepLoop
from elastic_moe.actors.garbage import keep_collections_short
from elastic_moe.actors.logs import LogSettings, set_up
from elastic_moe.actors.loop_watch import LoopWatch
from elastic_moe.actors.remote.addresses import node_address
from elastic_moe.actors.remote.ask import Remote, ask
from elastic_moe.actors.remote.calls import call_all, one_line
from elastic_moe.actors.remote.links import can_connect
from elastic_moe.actors.scheduler.prefill_pace import PrefillPace
from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.actors.worker.worker_actor import WorkerActor
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import NotReadyError, StepAborted
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, ModelInfo, WorkerInfo
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.messages.views import EngineStatus
from elastic_moe.cluster.placement import WorkerId

log = logging.getLogger(__name__)

CPU_PREFILL_TOKENS = 48
"""Most prompt tokens of a worker in the first steps that also decode, until it is known how long they take."""

Workers = dict[WorkerId, Remote[WorkerActor]]


class StepReports(Protocol):
    """What the engine reports to the coordinator, which imports the engine and so cannot be imported here."""

    async def report_step_failure(self, epoch: Epoch, suspects: list[WorkerId], reason: str) -> None: ...

    async def report_late_step(self, workers: list[WorkerId]) -> None: ...


class Engine:
    """An async actor: everything runs on its event loop."""

    def __init__(self, config: ServeConfig, coordinator: Remote[StepReports], logs: LogSettings | None = None) -> None:
        """`logs`: where this process's log lines go; left as it is if not given."""
        if logs is not None:
            set_up(names.ENGINE, logs)
        self._config = config
        self._coordinator = coordinator
        self._workers: Workers = {}
        self._scheduler: Scheduler | None = None
        self._clients: Clients | None = None
        self._loop: StepLoop | None = None
        self._endpoint: Endpoint | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # --- Called by the coordinator ------------------------------------------------------------------------------

    async def change_epoch(
        self, model: ModelInfo, spec: EpochSpec, workers: Workers, infos: dict[WorkerId, WorkerInfo]
    ) -> int:
        """Flip to a prepared epoch at the next step boundary. The first one begins the serving of `model`: whether an
        epoch is the first is known here alone, since a coordinator may be another one than that which made this actor.

        Returns how many requests had to leave their worker. Raises StepAborted naming the workers that failed.
        """
        loop = self._loop or await self._start(model, infos)
        self._workers = {**self._workers, **workers}
        moved = await loop.change_epoch(spec, infos)
        self._workers = workers
        return moved

    async def _start(self, model: ModelInfo, infos: dict[WorkerId, WorkerInfo]) -> StepLoop:
        config = self._config
        scheduler = self._scheduler = Scheduler(
            {},
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_prefill_tokens=config.max_num_prefill_tokens,
            pace=None if config.max_num_prefill_tokens else PrefillPace(_first_prefill_tokens(config, infos)),
            max_model_len=min(model.max_model_len, config.max_model_len or model.max_model_len),
            eos_token_ids=model.eos_token_ids,
            enable_prefix_caching=config.enable_prefix_caching,
            rope_limits=model.rope_limits,
            rope_growth_limit=model.rope_growth_limit,
        )
        clients = self._clients = Clients(scheduler, submitted=lambda: loop.wake())
        loop = self._loop = StepLoop(
            scheduler,
            clients,
            step_timeout_s=config.step_timeout,
            abort=self._abort,
            report=self._report,
            late=self._late,
        )
        watch = LoopWatch("the engine")
        short = keep_collections_short(lambda: scheduler.num_requests)
        self._tasks = [asyncio.create_task(work) for work in (loop.run(), clients.watch(), watch.watch(), short)]
        for task in self._tasks:
            task.add_done_callback(_die_of)
        self._endpoint = await clients.listen(node_address(config.interface))
        return loop

    async def reach(self, endpoints: dict[WorkerId, Endpoint]) -> None:
        """Try to connect to these workers, before an epoch begins that could not serve without them.

        Raises StepAborted naming those that cannot be reached from here.
        """
        calls = {worker: can_connect(endpoint) for worker, endpoint in endpoints.items()}
        errors = await call_all(calls, liveness.CONNECT_S)
        if errors:
            found = "; ".join(
                f"{worker} at {endpoints[worker].address}:{endpoints[worker].port}: {one_line(error)}"
                for worker, error in errors.items()
            )
            raise StepAborted(f"the engine cannot reach {found}")

    async def drain(self, workers: Sequence[WorkerId]) -> None:
        """Give no new requests to exactly these workers from now on."""
        if self._scheduler is not None and self._loop is not None:
            self._scheduler.drain(workers)
            self._loop.wake()

    async def lose(self, worker: WorkerId) -> None:
        """The coordinator has ended this worker, or believes that it is dead. Where its host is cut off, its connection
        would not end by itself."""
        if self._loop is not None:
            self._loop.lose(worker)

    async def stay(self) -> None:
        """Never answers. A caller that waits notices at once when this process dies."""
        await asyncio.Event().wait()

    async def status(self) -> EngineStatus:
        if self._scheduler is None or self._clients is None or self._loop is None:
            return EngineStatus()
        clients = self._clients
        return replace(
            self._scheduler.status(),
            epoch=self._loop.epoch,
            first_tokens=clients.first_tokens,
            first_tokens_s=clients.first_tokens_s,
            replicas=len(clients.present),
        )

    # --- Called by API replicas ---------------------------------------------------------------------------------

    async def endpoint(self) -> Endpoint:
        """Where API replicas connect. Raises NotReadyError before the engine has been started."""
        if self._endpoint is None:
            raise NotReadyError("the engine has not been started")
        return self._endpoint

    # --- Called by the loop -------------------------------------------------------------------------------------

    def _abort(self, epoch: Epoch, workers: Iterable[WorkerId]) -> None:
        for worker in workers:
            # by a Ray call, because the connection is read only after the step that is to be aborted
            ask(self._workers[worker], WorkerActor.abort_step, epoch)

    def _report(self, epoch: Epoch, suspects: Sequence[WorkerId], reason: str) -> None:
        ask(self._coordinator, StepReports.report_step_failure, epoch, list(suspects), reason)

    def _late(self, workers: Sequence[WorkerId]) -> None:
        ask(self._coordinator, StepReports.report_late_step, list(workers))


def _first_prefill_tokens(config: ServeConfig, infos: dict[WorkerId, WorkerInfo]) -> int:
    return CPU_PREFILL_TOKENS if any(info.device == "cpu" for info in infos.values()) else config.max_num_batched_tokens


def _die_of(task: asyncio.Task[None]) -> None:
    """End this process if its loop has failed: the engine is then replaced, and requests are sent again."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the step loop failed", exc_info=error)
        os._exit(1)
