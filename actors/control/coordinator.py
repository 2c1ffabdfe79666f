"""The coordinator: the shell around cluster/control/state.py. It watches, feeds events, and has commands carried out.

An async actor: everything runs on its event loop, so the state is never seen half changed. Nothing here decides.

    polls (polling.py), answers (executor.py), requests  ->  events  ->  ControlState  ->  commands  ->  executor.py
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import textwrap
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

from elastic_moe.actors import liveness
from elastic_moe.actors.control.executor import Executor
from elastic_moe.actors.control.fleet import Fleet
from elastic_moe.actors.control.opening import control_settings, model_spec
from elastic_moe.actors.control.planning import Planners, preview
from elastic_moe.actors.control.polling import Poller
from elastic_moe.actors.control.processes import Processes
from elastic_moe.actors.control.roll_call import RollCall
from elastic_moe.actors.control.views import (
    Outline,
    log_changes,
    placement_view,
    routing_view,
    standby_view,
    with_progress,
    worker_view,
)
from elastic_moe.actors.engine.engine import Engine
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.actors.remote.calls import one_line
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.control.state import ControlState
from elastic_moe.cluster.errors import ConfigError, NotReadyError, UserError
from elastic_moe.cluster.facts.counters import ClusterCounters
from elastic_moe.cluster.facts.events import (
    Abandon,
    AbortSteps,
    Command,
    Commit,
    Drain,
    Event,
    PlaceRequested,
    Prepare,
    Probe,
    RebalanceRequested,
    Resumed,
    RoutingCounted,
    ScaleRequested,
    Solve,
    StartWorker,
    StepFailed,
    StopWorker,
    Tick,
    Transfer,
    Unpin,
)
from elastic_moe.cluster.facts.facts import Stage
from elastic_moe.cluster.facts.routing import RoutingWindow
from elastic_moe.cluster.messages.epochs import Epoch, ModelInfo, ModelSpec
from elastic_moe.cluster.messages.views import (
    Operation,
    PlacementView,
    Readiness,
    RebalancePreview,
    RoutingView,
    ScaleView,
    WorkerView,
)
from elastic_moe.cluster.placement import Placement, WorkerId
from elastic_moe.optimizer import PLANNERS

logger = logging.getLogger(__name__)

P = ParamSpec("P")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of a coordinator, made once the checkpoint has been opened."""

    state: ControlState
    spec: ModelSpec
    window: RoutingWindow
    processes: Processes
    roll_call: RollCall
    executor: Executor
    poller: Poller
    planners: Planners


class Coordinator:
    """One per cluster. Create it on a running event loop: it begins at once, and `readiness` reports its progress."""

    def __init__(self, config: ServeConfig, model_dir: str, fleet: Fleet) -> None:
        self._config = config
        self._model_dir = model_dir
        self._fleet = fleet
        self._error: str | None = None
        self._parts: Parts | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened = asyncio.Event()
        self._spawn(self._run())

    # --- What others may call -----------------------------------------------------------------------------------

    async def readiness(self) -> Readiness:
        if self._error is not None:
            return Readiness(ready=False, reason=self._error, error=self._error)
        if self._parts is None:
            return Readiness(ready=False, reason="opening the checkpoint")
        readiness = self._parts.state.readiness()
        loading = [record for record in self._parts.state.facts.alive if not record.loaded]
        if readiness.ready or readiness.error or not loading:
            return readiness
        now = time.monotonic()
        shares = ", ".join(f"{record.id} {self._parts.poller.how_far(record, now)}" for record in loading)
        return Readiness(ready=False, reason=f"{readiness.reason}; loading: {shares}")

    async def model_info(self) -> ModelInfo:
        return self._require_parts().state.model

    async def placement(self) -> PlacementView:
        return placement_view(self._require_parts().state)

    async def routing(self) -> RoutingView:
        parts = self._require_parts()
        return routing_view(parts.window, placement_view(parts.state).placement, time.monotonic())

    async def workers(self) -> list[WorkerView]:
        parts = self._require_parts()
        await parts.poller.refresh_status()
        facts, device = parts.state.facts, self._fleet.device()
        poller = parts.poller
        views = [
            worker_view(facts, record, poller.status, device, poller.resident.get(record.id))
            for record in facts.records.values()
        ]
        standby = parts.processes.standby
        return views if standby is None else [*views, standby_view(*standby, device)]

    async def rebalance(self, planner: str, dry_run: bool) -> Operation | RebalancePreview:
        """Raises ConflictError, NotReadyError, and ConfigError for an unknown planner."""
        if planner not in PLANNERS:
            raise ConfigError(f"planner: expected one of {', '.join(PLANNERS)}, got {planner!r}")
        parts = self._require_parts()
        if dry_run:
            # raises NotReadyError before there is anything to plan for
            placement_view(parts.state)
            return preview(*await parts.planners.solve(planner, parts.state.facts))
        self._feed(RebalanceRequested(planner=planner))
        return _newest(parts.state)

    async def scale(
        self,
        workers: int | None = None,
        retire: tuple[WorkerId, ...] = (),
        operation_id: str | None = None,
        replace: bool = False,
    ) -> Operation:
        """Returns the operation: a new one, or the known one if `operation_id` was used before.

        Raises ConflictError, NotReadyError, and PlacementError for a number or a name that is not possible.
        """
        state = self._require_parts().state
        self._feed(ScaleRequested(workers=workers, retire=retire, operation_id=operation_id, replace=replace))
        known = state.operations.get(operation_id) if operation_id is not None else None
        return _newest(state) if known is None else with_progress(state, known)

    async def scaling(self) -> ScaleView:
        return self._require_parts().state.view()

    async def place(self, placement: Placement, pinned: bool | None) -> Operation:
        """Go to exactly this placement. Raises ConflictError, NotReadyError, PlacementError."""
        state = self._require_parts().state
        self._feed(PlaceRequested(placement=placement, pinned=pinned))
        return _newest(state)

    async def unpin(self) -> None:
        self._feed(Unpin())

    async def operations(self) -> list[Operation]:
        """Newest first."""
        state = None if self._parts is None else self._parts.state
        return [] if state is None else [with_progress(state, operation) for operation in state.operations.all()]

    async def operation(self, operation_id: str) -> Operation | None:
        state = None if self._parts is None else self._parts.state
        operation = None if state is None else state.operations.get(operation_id)
        return None if state is None or operation is None else with_progress(state, operation)

    async def counters(self) -> ClusterCounters:
        return ClusterCounters() if self._parts is None else self._parts.state.counters

    async def engine(self) -> Remote[Engine] | None:
        """The engine's handle; None before the first epoch, and while a lost engine has no successor."""
        if self._parts is None or self._parts.state.facts.spec is None:
            return None
        return self._parts.processes.engine

    async def report_step_failure(self, epoch: Epoch, suspects: list[WorkerId], reason: str) -> None:
        """Called by the engine when a step has failed. Returns at once; a new epoch will follow."""
        # Ray explains a death in a paragraph
        reason = textwrap.shorten(reason.partition(". ")[0], 200, placeholder=" ...")
        await self._opened.wait()
        logger.warning("epoch %d: a step failed (suspects: %s): %s", epoch, ", ".join(suspects) or "none", reason)
        self._feed(StepFailed(epoch=epoch, suspects=tuple(suspects), reason=reason))

    async def report_late_step(self, workers: list[WorkerId]) -> None:
        """Called by the engine when these workers are late with a step. They are pinged, and one that hangs is lost."""
        await self._opened.wait()
        for event in await self._require_parts().roll_call.find_silent(workers):
            self._feed(event)

    async def shutdown(self) -> None:
        """End every actor that this coordinator made. `stop_cluster` deletes the saved state."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if self._parts is not None:
            self._parts.processes.kill_all()
        logger.info("shut down")

    # --- Running ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            self._fleet.attach()
            saved = self._fleet.saved()
            if saved is None or not await self._resume(saved):
                self._fleet.clear()
                await self._open()
        except (UserError, OSError) as error:
            self._error = one_line(error)
            logger.error("cannot serve %s: %s", self._model_dir, self._error)
            return
        polled_at = 0.0
        while True:
            now = time.monotonic()
            if now - polled_at >= liveness.POLL_S:
                polled_at = now
                self._poll(now)
            self._feed(Tick())
            await asyncio.sleep(liveness.TICK_S)

    async def _open(self) -> None:
        """Read the checkpoint's description of the model, and begin."""
        model = await asyncio.to_thread(self._fleet.read_model, self._model_dir)
        spec = model_spec(self._config, model, self._model_dir, self._fleet.device())
        state = ControlState(control_settings(self._config, model, self._fleet), model)
        self._take_up(state, spec, self._processes(model))
        logger.info("%s: %s with %d MoE layers of %d experts, %s on %s", self._model_dir, model.architecture,
                    model.num_layers, model.num_logical_experts, spec.dtype, spec.device)  # fmt: skip

    async def _resume(self, saved: bytes) -> bool:
        """Continue from the state that an earlier coordinator saved. Returns False if it had no epoch yet."""
        state, spec = pickle.loads(saved)
        facts = state.facts
        if facts.spec is None:
            return False
        processes = self._processes(state.model)
        events = processes.adopt(facts.alive)
        # the state cannot take events before the outcome of a flip is known; nothing else is worth waiting for
        flipping = facts.change is not None and facts.change.stage is Stage.COMMITTING
        engine_epoch = await processes.engine_epoch() if flipping else None
        logger.warning("the coordinator was restarted in epoch %d with %d workers", facts.epoch, len(processes.workers))
        self._take_up(state, spec, processes)
        for event in (Resumed(engine_epoch=engine_epoch), *events):
            self._feed(event)
        return True

    def _processes(self, model: ModelInfo) -> Processes:
        return Processes(self._fleet, model.expert_bytes)

    def _take_up(self, state: ControlState, spec: ModelSpec, processes: Processes) -> None:
        model, config, fleet = state.model, self._config, self._fleet
        heartbeat_timeout_s = config.heartbeat_timeout
        window_s = config.rebalance_interval or 60.0
        window = RoutingWindow(model.num_layers, model.num_logical_experts, window_s=window_s)
        roll_call = RollCall(processes, heartbeat_timeout_s)
        self._parts = Parts(
            state=state,
            spec=spec,
            window=window,
            processes=processes,
            roll_call=roll_call,
            executor=Executor(fleet, config, model, spec, processes, roll_call),
            poller=Poller(
                processes,
                window,
                state.counters,
                heartbeat_timeout_s=heartbeat_timeout_s,
                feed=self._feed,
                spawn=self._spawn,
            ),
            planners=Planners(fleet, config, model, spec.dtype, window),
        )
        self._opened.set()

    def _poll(self, now: float) -> None:
        parts = self._require_parts()
        self._feed(RoutingCounted(load=parts.window.load(now)))
        facts = parts.state.facts
        parts.poller.poll(facts)
        if parts.processes.wants_standby and facts.whole and now - facts.epoch_since > liveness.STANDBY_AFTER_S:
            self._spawn(parts.processes.start_standby(parts.state.next_worker))

    def _feed(self, event: Event) -> None:
        parts = self._require_parts()
        before = Outline.of(parts.state)
        commands = parts.state.handle(event, time.monotonic())
        log_changes(before, parts.state)
        if commands or before != Outline.of(parts.state):
            # saved before any command is carried out, so that a successor knows what may have been done
            self._fleet.save(pickle.dumps((parts.state, parts.spec)))
        for command in commands:
            self._carry_out(command, parts)

    def _carry_out(self, command: Command, parts: Parts) -> None:
        executor = parts.executor
        match command:
            case StartWorker():
                self._begin(executor.start_worker, command)
            case StopWorker():
                parts.poller.forget(command.worker)
                parts.processes.stop_worker(command.worker, command.info)
            case Transfer():
                self._begin(executor.transfer, command)
            case Prepare():
                self._begin(executor.prepare, command)
            case Commit():
                self._begin(executor.commit, command)
            case Abandon():
                executor.abandon(command)
            case AbortSteps():
                executor.abort_steps(command)
            case Drain():
                executor.drain(command)
            case Probe():
                self._begin(executor.probe, command)
            case Solve():
                self._begin(parts.planners.answer, command, parts.state.facts)

    def _begin(self, work: Callable[P, Awaitable[Sequence[Event]]], *command: P.args, **named: P.kwargs) -> None:
        """Begin `work`, whose answers are fed when it is done."""

        async def answer() -> None:
            for event in await work(*command, **named):
                self._feed(event)

        self._spawn(answer())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # a defect of ours: the state will wait for this answer for ever, which /ready has to say
            logger.critical("the control plane failed", exc_info=error)
            self._error = f"the control plane failed: {one_line(error)}"

    def _require_parts(self) -> Parts:
        if self._parts is None:
            raise NotReadyError(self._error or "opening the checkpoint")
        return self._parts


def _newest(state: ControlState) -> Operation:
    return with_progress(state, state.operations.all()[0])
