"""The coordinator: the shell around cluster/state.py. It watches, feeds events, and has commands carried out.

An async actor: everything runs on its event loop, so the state is never seen half changed. Nothing here decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import textwrap
import time
from collections.abc import Coroutine
from typing import Any

from actors.calls import CALL_ERRORS, is_death, one_line, sign_of_life
from actors.executor import Executor
from actors.fleet import Fleet
from actors.planning import build_problem, judge, preview, to_event
from actors.telling import Outline, load_seen, log_changes, standby_view, with_progress, worker_view
from cluster.config import ServeConfig
from cluster.counters import ClusterCounters
from cluster.errors import ConfigError, NotReadyError, UserError
from cluster.events import (
    Abandon,
    AbortSteps,
    Command,
    Commit,
    Drain,
    Event,
    PlaceRequested,
    PlanReady,
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
    WorkerLost,
)
from cluster.facts import ControlSettings, Stage
from cluster.membership import Member
from cluster.messages.epochs import Epoch, ModelInfo, ModelSpec
from cluster.messages.views import (
    EngineStatus,
    Operation,
    PlacementView,
    Readiness,
    RebalancePreview,
    RoutingView,
    ScaleView,
    WorkerView,
)
from cluster.placement import Placement, WorkerId
from cluster.rebalancing import room
from cluster.routing import RoutingWindow, decode_weight, load_imbalance, weighted_load
from cluster.state import ControlState
from optimizer import PLANNERS, PlanResult
from optimizer.decision import Decision

logger = logging.getLogger(__name__)

TICK_S = 0.5
POLL_S = 1.0
LOADING_PATIENCE = 4.0
"""A host that loads may be late by so many times a heartbeat's time-out: imports hold its threads up."""
SPARE_AFTER_S = 3.0
"""A spare process is started once an epoch has served for so long: it takes some seconds of a core."""
COUNTS_PER_WINDOW = 12
"""How often routing counts are fetched: they are megabytes for a large model."""
START_S = 30.0
"""A process that has not begun to load by then is most likely waiting for a free GPU or core."""


class Coordinator:
    """One per cluster. Create it on a running event loop: it begins at once, and `readiness` says how far it is."""

    def __init__(self, config: ServeConfig, model_dir: str, fleet: Fleet) -> None:
        self._config = config
        self._model_dir = model_dir
        self._fleet = fleet
        self._error: str | None = None
        self._model: ModelInfo | None = None
        self._spec: ModelSpec | None = None
        self._state: ControlState | None = None
        self._window: RoutingWindow | None = None
        self._executor: Executor | None = None
        self._status = EngineStatus()
        self._progress: dict[WorkerId, float] = {}
        self._counted_at: dict[WorkerId, float] = {}
        """When each worker's routing counts were last asked for."""
        self._polling: set[str] = set()
        self._watched: Any = None
        """The engine whose end is waited for."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened = asyncio.Event()
        self._spawn(self._run())

    # --- What others may call -----------------------------------------------------------------------------------

    async def readiness(self) -> Readiness:
        if self._error is not None:
            return Readiness(ready=False, reason=self._error, error=self._error)
        if self._state is None:
            return Readiness(ready=False, reason="opening the checkpoint")
        readiness = self._state.readiness()
        loading = [member for member in self._state.facts.alive if not member.loaded]
        if readiness.ready or readiness.error or not loading:
            return readiness
        shares = ", ".join(f"{member.id} {self._how_far(member)}" for member in loading)
        return Readiness(ready=False, reason=f"{readiness.reason}; loading: {shares}")

    def _how_far(self, member: Member) -> str:
        if member.id in self._progress:
            return f"{self._progress[member.id]:.0%}"
        waited = time.monotonic() - member.asked_at
        return "waiting for resources" if waited > START_S else "starting its process"

    async def model_info(self) -> ModelInfo:
        if self._model is None:
            raise NotReadyError(self._error or "opening the checkpoint")
        return self._model

    async def placement(self) -> PlacementView:
        state = self._require_state()
        facts = state.facts
        if facts.spec is None:
            raise NotReadyError(state.readiness().reason)
        return PlacementView(epoch=facts.epoch, placement=facts.spec.placement, pinned=facts.pinned)

    async def routing(self) -> RoutingView:
        view = await self.placement()
        assert self._window is not None
        now = time.monotonic()
        prefill, decode = self._window.phases(now)
        load = prefill.load + decode.load
        return RoutingView(
            tokens=prefill.tokens + decode.tokens,
            window_s=self._window.window_s,
            load=load,
            load_imbalance=tuple(load_imbalance(load, view.placement).tolist()),
            prefill=prefill,
            decode=decode,
            decode_weight=decode_weight(prefill, decode),
        )

    async def workers(self) -> list[WorkerView]:
        state = self._require_state()
        await self._refresh_status()
        facts = state.facts
        views = [worker_view(facts, member, self._status, self._fleet.device()) for member in facts.members.values()]
        standby = None if self._executor is None else self._executor.standby
        return views if standby is None else [*views, standby_view(*standby, self._fleet.device())]

    async def _refresh_status(self) -> None:
        """Whoever asks wants what is, not what was at the last poll; but an engine that is busy dying keeps nobody."""
        engine = await self.engine()
        if engine is not None:
            with contextlib.suppress(*CALL_ERRORS):
                self._status = await asyncio.wait_for(engine.status.remote(), POLL_S)

    async def rebalance(self, planner: str, dry_run: bool) -> Operation | RebalancePreview:
        """Raises ConflictError, NotReadyError, and ConfigError for an unknown planner."""
        if planner not in PLANNERS:
            raise ConfigError(f"planner: expected one of {', '.join(PLANNERS)}, got {planner!r}")
        state = self._require_state()
        if dry_run:
            await self.placement()
            result, decision = await self._solve(planner)
            return preview(result, decision)
        self._feed(RebalanceRequested(planner=planner))
        return self._newest(state)

    async def scale(
        self,
        workers: int | None = None,
        retire: tuple[WorkerId, ...] = (),
        operation_id: str | None = None,
        replace: bool = False,
    ) -> Operation:
        """The operation: a new one, or that of `operation_id`, where it was asked for before.

        Raises ConflictError, NotReadyError, and PlacementError for a number or a name that cannot be.
        """
        state = self._require_state()
        self._feed(ScaleRequested(workers=workers, retire=retire, operation_id=operation_id, replace=replace))
        known = state.operations.get(operation_id) if operation_id is not None else None
        return self._newest(state) if known is None else with_progress(state, known)

    async def scaling(self) -> ScaleView:
        return self._require_state().view()

    async def place(self, placement: Placement, pinned: bool | None) -> Operation:
        """Go to exactly this placement. Raises ConflictError, NotReadyError, PlacementError."""
        state = self._require_state()
        self._feed(PlaceRequested(placement=placement, pinned=pinned))
        return self._newest(state)

    async def unpin(self) -> None:
        self._feed(Unpin())

    async def operations(self) -> list[Operation]:
        """Newest first."""
        state = self._state
        return [] if state is None else [with_progress(state, operation) for operation in state.operations.all()]

    async def operation(self, operation_id: str) -> Operation | None:
        operation = None if self._state is None else self._state.operations.get(operation_id)
        return None if operation is None or self._state is None else with_progress(self._state, operation)

    async def counters(self) -> ClusterCounters:
        return ClusterCounters() if self._state is None else self._state.counters

    async def engine(self) -> Any:
        """The engine's handle; None before the first epoch, and while a lost engine has no successor."""
        if self._state is None or self._state.facts.spec is None or self._executor is None:
            return None
        return self._executor.engine

    async def report_step_failure(self, epoch: Epoch, suspects: list[WorkerId], reason: str) -> None:
        """From the engine: its group is of no use any more. Returns at once; a new epoch will follow."""
        # Ray explains a death in a paragraph
        reason = textwrap.shorten(reason.partition(". ")[0], 200, placeholder=" ...")
        await self._opened.wait()
        logger.warning("epoch %d: a step failed (suspects: %s): %s", epoch, ", ".join(suspects) or "none", reason)
        self._feed(StepFailed(epoch=epoch, suspects=tuple(suspects), reason=reason))

    async def report_late_step(self, workers: list[WorkerId]) -> None:
        """From the engine: these have not finished a step. Nothing is decided by that, but one that hangs is found."""
        await self._opened.wait()
        assert self._executor is not None
        for event in await self._executor.find_silent(workers):
            self._feed(event)

    async def shutdown(self) -> None:
        """End every actor that this one made. What it had saved is forgotten by `stop_cluster`."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if self._executor is not None:
            self._executor.kill_all()
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
            if now - polled_at >= POLL_S:
                polled_at = now
                self._poll_all()
            self._feed(Tick())
            await asyncio.sleep(TICK_S)

    async def _open(self) -> None:
        """Read what the checkpoint says of itself, and settle what the configuration leaves open."""
        config = self._config
        model = await asyncio.to_thread(self._fleet.read_model, self._model_dir)
        if (config.max_model_len or 0) > model.max_model_len:
            raise ConfigError(f"max_model_len: the model allows {model.max_model_len}, got {config.max_model_len}")
        spec = ModelSpec(
            path=self._model_dir,
            dtype=model.dtype if config.dtype == "auto" else config.dtype,
            device=self._fleet.device(),
            max_model_len=config.max_model_len or model.max_model_len,
            expert_dtype=config.expert_dtype,
        )
        settings = ControlSettings(
            workers=config.workers,
            redundant_experts=config.redundant_experts,
            rebalance_interval_s=config.rebalance_interval,
            min_workers=config.min_workers,
            max_workers=config.max_workers,
            autoscale_window_s=config.autoscale_window,
            seats_per_worker=config.max_num_seqs,
            drain_timeout_s=config.drain_timeout,
            expert_capacity=(
                None if config.expert_memory_bytes is None else config.expert_memory_bytes // model.expert_bytes
            ),
            shared_gpus=self._fleet.shared_gpus,
            cluster_id=f"emoe-{os.getpid()}-{time.time_ns() % 10**9}",
        )
        self._take_up(ControlState(settings, model), spec)
        logger.info("%s: %s with %d MoE layers of %d experts, %s on %s", self._model_dir, model.architecture,
                    model.num_layers, model.num_logical_experts, spec.dtype, spec.device)  # fmt: skip

    def _take_up(self, state: ControlState, spec: ModelSpec) -> None:
        model, config = state.model, self._config
        self._window = RoutingWindow(
            model.num_layers, model.num_logical_experts, window_s=config.rebalance_interval or 60.0
        )
        self._executor = Executor(self._fleet, config, model, spec)
        self._model, self._spec, self._state = model, spec, state
        self._opened.set()

    async def _resume(self, saved: bytes) -> bool:
        """Go on from what the coordinator before this one had saved. False where there was no epoch yet to keep."""
        state, spec = pickle.loads(saved)
        facts = state.facts
        if facts.spec is None:
            return False
        executor = Executor(self._fleet, self._config, state.model, spec)
        events = executor.adopt(facts.alive)
        # only the outcome of a flip is worth waiting for: until then nobody can be told anything
        flipping = facts.change is not None and facts.change.stage is Stage.COMMITTING
        engine_epoch = await executor.engine_epoch() if flipping else None
        logger.warning("the coordinator was restarted in epoch %d with %d workers", facts.epoch, len(executor.hosts))
        self._take_up(state, spec)
        self._executor = executor
        for event in (Resumed(engine_epoch=engine_epoch), *events):
            self._feed(event)
        return True

    def _feed(self, event: Event) -> None:
        state = self._require_state()
        before = Outline.of(state)
        commands = state.handle(event, time.monotonic())
        log_changes(before, state)
        if commands or before != Outline.of(state):
            # before anything is done, so that a successor knows of whatever may have been
            self._fleet.save(pickle.dumps((state, self._spec)))
        for command in commands:
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        executor = self._executor
        assert executor is not None
        match command:
            case StartWorker():
                self._spawn(self._answer(executor.start_worker(command)))
            case StopWorker():
                self._progress.pop(command.worker, None)
                self._counted_at.pop(command.worker, None)
                executor.stop_worker(command)
            case Transfer():
                self._spawn(self._answer(executor.transfer(command)))
            case Prepare():
                self._spawn(self._answer(executor.prepare(command)))
            case Commit():
                self._spawn(self._answer(executor.commit(command)))
            case Abandon():
                executor.abandon(command)
            case AbortSteps():
                executor.abort_steps(command)
            case Drain():
                executor.drain(command)
            case Probe():
                self._spawn(self._answer(executor.probe(command)))
            case Solve():
                self._spawn(self._answer(self._solve_command(command)))

    async def _answer(self, work: Coroutine[Any, Any, Event | list[Event]]) -> None:
        events = await work
        for event in events if isinstance(events, list) else [events]:
            self._feed(event)

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

    # --- Watching -----------------------------------------------------------------------------------------------

    def _poll_all(self) -> None:
        state, executor = self._require_state(), self._executor
        assert executor is not None
        assert self._window is not None
        self._feed(RoutingCounted(load=self._window.load(time.monotonic())))
        facts = state.facts
        for member in facts.alive:
            if member.id in executor.hosts and member.id not in self._polling:
                self._polling.add(member.id)
                self._spawn(self._poll_host(member, executor.hosts[member.id]))
        if executor.wants_spare and facts.whole and time.monotonic() - facts.epoch_since > SPARE_AFTER_S:
            self._spawn(executor.start_spare(state.next_worker))
        if executor.engine is not None and executor.engine_serves:
            if executor.engine is not self._watched:
                self._watched = executor.engine
                self._spawn(self._watch_engine(executor.engine))
            if "engine" not in self._polling:
                self._polling.add("engine")
                self._spawn(self._poll_engine())

    async def _poll_host(self, member: Member, host: Any) -> None:
        """Whether it lives, and what it has to tell."""
        assert self._window is not None
        timeout_s = self._config.heartbeat_timeout
        try:
            if member.loaded:
                await sign_of_life(host.ping, timeout_s)
                now = time.monotonic()
                if now - self._counted_at.get(member.id, 0.0) >= self._window.window_s / COUNTS_PER_WINDOW:
                    self._counted_at[member.id] = now
                    self._window.add(await host.routing_counts.remote(), time.monotonic())
            elif member.id in self._progress:
                self._progress[member.id] = await sign_of_life(host.load_progress, LOADING_PATIENCE * timeout_s)
            else:
                # its process may have to wait for resources
                self._progress[member.id] = await host.load_progress.remote()
        except CALL_ERRORS as error:
            if is_death(error) or isinstance(error, TimeoutError):
                self._feed(WorkerLost(worker=member.id, reason=one_line(error)))
            else:
                logger.warning("worker %s: %s", member.id, one_line(error))
        finally:
            self._polling.discard(member.id)

    async def _poll_engine(self) -> None:
        executor = self._executor
        assert executor is not None
        engine = executor.engine
        try:
            self._status = await sign_of_life(engine.status, self._config.heartbeat_timeout)
            self._feed(load_seen(self._status))
        except CALL_ERRORS as error:
            self._engine_lost(engine, error)
        finally:
            self._polling.discard("engine")

    async def _watch_engine(self, engine: Any) -> None:
        """Told at once when it dies, and not by the next poll."""
        try:
            await engine.stay.remote()
        except CALL_ERRORS as error:
            self._engine_lost(engine, error)

    def _engine_lost(self, engine: Any, error: BaseException) -> None:
        assert self._executor is not None
        event = self._executor.drop_engine(engine, one_line(error))
        if event is not None:
            self._feed(event)

    # --- Planning -----------------------------------------------------------------------------------------------

    async def _solve_command(self, command: Solve) -> Event:
        try:
            result, decision = await self._solve(command.planner or self._config.planner)
        except CALL_ERRORS as error:
            return PlanReady(
                ticket=command.ticket, placement=None, worthwhile=False, no_worse=False, reason=one_line(error)
            )
        return to_event(command.ticket, result, decision)

    async def _solve(self, planner: str) -> tuple[PlanResult, Decision]:
        view = await self.placement()
        assert self._window is not None
        assert self._model is not None
        assert self._spec is not None
        now = time.monotonic()
        prefill, decode = self._window.phases(now)
        load = prefill.load + decode.load
        problem = build_problem(
            self._model,
            view.placement,
            weighted_load(prefill, decode),
            self._window.transitions(now),
            dtype=self._spec.dtype,
            parts=self._window.load_parts(now),
            room=room(self._require_state().facts),
        )
        deadline_s = self._config.plan_deadline
        # the planner minds its deadline; a solver that does not is given up
        work = self._fleet.solve(problem, planner, deadline_s, self._config.solver)
        result = await asyncio.wait_for(work, 2 * deadline_s + 30)
        since = now - self._require_state().facts.epoch_since if view.epoch > 1 else None
        return result, judge(result, load=load, since_change_s=since)

    # --- Helpers ------------------------------------------------------------------------------------------------

    def _require_state(self) -> ControlState:
        if self._state is None:
            raise NotReadyError(self._error or "opening the checkpoint")
        return self._state

    def _newest(self, state: ControlState) -> Operation:
        return with_progress(state, state.operations.all()[0])
