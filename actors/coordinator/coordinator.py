"""The coordinator: the actor that others call to ask about the cluster and to change it.

It opens the checkpoint, or continues from the state of an earlier coordinator, and then runs the control loop
(actors/coordinator/control_loop.py). It is an async actor: everything runs on its event loop. Nothing here decides.
"""

from __future__ import annotations

import asyncio
import logging
import textwrap
import time

from elastic_moe.actors import liveness
from elastic_moe.actors.coordinator.control_loop import ControlLoop
from elastic_moe.actors.coordinator.fleet import Fleet
from elastic_moe.actors.coordinator.opening import control_settings, model_spec
from elastic_moe.actors.coordinator.processes import Processes
from elastic_moe.actors.coordinator.views import (
    newest_operation,
    operation_views,
    placement_view,
    routing_view,
    with_progress,
)
from elastic_moe.actors.departure import Departure
from elastic_moe.actors.engine.engine import Engine
from elastic_moe.actors.garbage import keep_collections_short
from elastic_moe.actors.loop_watch import LoopWatch
from elastic_moe.actors.remote.ask import Remote, ask
from elastic_moe.actors.remote.background import Background
from elastic_moe.actors.remote.calls import CALL_ERRORS, one_line, within
from elastic_moe.actors.remote.saving import Saver
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.control.state import ControlState
from elastic_moe.cluster.control.succession import asks_for_way
from elastic_moe.cluster.errors import NotReadyError, UserError
from elastic_moe.cluster.facts.counters import ClusterCounters
from elastic_moe.cluster.facts.events import (
    PlaceRequested,
    RebalanceRequested,
    Resumed,
    ScaleRequested,
    StepFailed,
    Unpin,
)
from elastic_moe.cluster.facts.facts import Stage
from elastic_moe.cluster.facts.membership import WorkerRecord
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.epochs import Epoch, ModelInfo, ModelSpec
from elastic_moe.cluster.messages.views import (
    ClusterView,
    ConfigView,
    Operation,
    PlacementView,
    Readiness,
    RebalancePreview,
    Revision,
    RoutingView,
    ScaleView,
    WorkerView,
)
from elastic_moe.cluster.placement import Placement, WorkerId
from elastic_moe.cluster.redeploy import changes, generation_of, in_words
from elastic_moe.optimizer import check_planner
from elastic_moe.optimizer.subjects.memory import SavedSubjects

logger = logging.getLogger(__name__)


class Coordinator:
    """One per cluster. Create it on a running event loop: it begins at once, and `readiness` reports its progress."""

    def __init__(self, config: ServeConfig, model_dir: str, fleet: Fleet) -> None:
        self._config = config
        self._model_dir = model_dir
        self._fleet = fleet
        self._saver = Saver(fleet.store, (WorkerRecord, Placement, SavedSubjects))
        self._error: str | None = None
        self._loop: ControlLoop | None = None
        self._background = Background(self._has_failed)
        self._opened = asyncio.Event()
        self.watch = LoopWatch("the coordinator")
        self._departure = Departure(config.api_replicas)
        self._asked_for_way = False
        """Whether other clusters have been asked to give way to this one."""
        self._configuring = asyncio.Lock()
        self._background.start(self._run())
        self._watching = Background(self._has_failed)
        self._watching.start(self._watch_succession())

    # --- What others may call -----------------------------------------------------------------------------------

    async def readiness(self) -> Readiness:
        if self._error is not None:
            return Readiness(ready=False, reason=self._error, error=self._error)
        if self._loop is None:
            return Readiness(ready=False, reason="opening the checkpoint")
        return self._loop.readiness(time.monotonic())

    async def model_info(self) -> ModelInfo:
        return self._require_loop().state.model

    async def placement(self) -> PlacementView:
        return placement_view(self._require_loop().state)

    async def routing(self) -> RoutingView:
        loop = self._require_loop()
        # `emoe top` and pages ask each second
        await loop.poller.refresh_counts(loop.state.facts, liveness.POLL_S)
        return routing_view(loop.window, placement_view(loop.state).placement, time.monotonic())

    async def workers(self) -> list[WorkerView]:
        loop = self._require_loop()
        await loop.poller.refresh_status()
        return loop.workers(time.monotonic())

    async def cluster(self, known: Revision) -> ClusterView:
        """Everything that an open page shows, in one call. `known`: the revision of the caller's last answer.

        The engine's status is that of the last poll, which takes no call to the engine.
        """
        return self._require_loop().cluster(known, time.monotonic())

    async def preview(self, planner: str) -> RebalancePreview:
        """What a re-placement would gain. Raises NotReadyError, and ConfigError for an unknown planner."""
        check_planner(planner)
        loop = self._require_loop()
        # raises NotReadyError before there is anything to plan for
        placement_view(loop.state)
        await loop.poller.refresh_counts(loop.state.facts)
        return await loop.planners.preview(planner, loop.state.facts)

    async def rebalance(self, planner: str) -> Operation:
        """Raises ConflictError, which names the running operation, NotReadyError, and ConfigError as `preview`."""
        check_planner(planner)
        loop = self._require_loop()
        # the last poll may have been before the requests that this is about
        await loop.poller.refresh_counts(loop.state.facts)
        loop.feed(RebalanceRequested(planner=planner))
        return newest_operation(loop.state)

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
        loop = self._require_loop()
        loop.feed(ScaleRequested(workers=workers, retire=retire, operation_id=operation_id, replace=replace))
        known = loop.state.operations.get(operation_id) if operation_id is not None else None
        return newest_operation(loop.state) if known is None else with_progress(loop.state.facts, known)

    async def scaling(self) -> ScaleView:
        return self._require_loop().state.view()

    async def place(self, placement: Placement, pinned: bool | None) -> Operation:
        """Go to exactly this placement. Raises ConflictError, NotReadyError, PlacementError."""
        loop = self._require_loop()
        loop.feed(PlaceRequested(placement=placement, pinned=pinned))
        return newest_operation(loop.state)

    async def unpin(self) -> None:
        self._require_loop().feed(Unpin())

    async def operations(self) -> list[Operation]:
        """Newest first."""
        return [] if self._loop is None else operation_views(self._loop.state)

    async def operation(self, operation_id: str) -> Operation | None:
        state = None if self._loop is None else self._loop.state
        operation = None if state is None else state.operations.get(operation_id)
        return None if state is None or operation is None else with_progress(state.facts, operation)

    async def counters(self) -> ClusterCounters:
        return ClusterCounters() if self._loop is None else self._loop.state.counters

    async def config(self) -> ConfigView:
        """What is in force here."""
        return ConfigView(
            generation=generation_of(self._config, self._model_dir),
            model_dir=self._model_dir,
            device=None if self._loop is None else self._fleet.device(),
            config=self._config,
        )

    async def fleet_beside(self, group: int) -> Fleet:
        """What the coordinator of another group of this cluster is made with."""
        return self._fleet.beside(group)

    async def reconfigure(self, config: ServeConfig) -> None:
        """Called by each API replica of a redeploy that kept the model: take over the settings that may have changed.

        A cluster that can never serve begins again: the redeploy may have mended the cause. Raises PlacementError for a
        number of workers that is not possible; then nothing has changed.
        """
        async with self._configuring:
            self._departure.take_back()
            if (await self.readiness()).error is not None:
                logger.warning("begins again after a redeploy; before: %s", (await self.readiness()).error)
                await self._begin_again(config)
                return
            different = changes(self._config, config)
            if config == self._config:
                return
            if self._loop is not None:
                await self._loop.configure(config)
            self._config = config
            self._departure.crew.expect(config.api_replicas)
            logger.info("redeployed: %s", in_words(different))

    async def give_way(self) -> None:
        """Called by the coordinator of the cluster that is to replace this one, and that lacks resources."""
        self._departure.give_way(time.monotonic())

    async def needs_way(self) -> bool:
        """Whether this cluster has asked others to give way, and could not serve since."""
        return self._asked_for_way and self._loop is not None and self._loop.state.facts.spec is None

    async def engine(self) -> Remote[Engine] | None:
        """The engine's handle; None before the first epoch, and while a lost engine has no successor."""
        if self._loop is None or self._loop.state.facts.spec is None:
            return None
        return self._loop.processes.engine

    async def check_in(self, replica: str, running: int, refuses: bool) -> bool:
        """Called by every API replica, again and again, with the number of requests that it runs, and whether it
        refused new ones before it counted.

        Returns whether it must refuse new ones: at once if so, and else after CHECK_IN_S.
        """
        return await self._departure.check_in(replica, running, refuses, time.monotonic())

    async def check_out(self, replica: str) -> int:
        """Called by an API replica that ends. Returns how many others there are."""
        return self._departure.crew.check_out(replica, time.monotonic())

    async def stop_requests(self) -> int:
        """Have all API replicas refuse new requests. Returns the number of requests that still run."""
        return self._departure.stop_requests(time.monotonic())

    async def report_step_failure(self, epoch: Epoch, suspects: list[WorkerId], reason: str) -> None:
        """Called by the engine when a step has failed. Returns at once; a new epoch will follow."""
        # Ray explains a death in a paragraph
        reason = textwrap.shorten(reason.partition(". ")[0], 200, placeholder=" ...")
        await self._opened.wait()
        loop = self._require_loop()
        # an engine at rest hears that its workers have ended
        level = logging.DEBUG if loop.state.facts.rests else logging.INFO
        names = ", ".join(suspects) or "none"
        logger.log(level, "epoch %d: a step failed (suspects: %s): %s", epoch, names, reason)
        loop.feed(StepFailed(epoch=epoch, suspects=tuple(suspects), reason=reason))

    async def report_late_step(self, workers: list[WorkerId]) -> None:
        """Called by the engine when these workers are late with a step. They are pinged, and one that hangs is lost."""
        await self._opened.wait()
        loop = self._require_loop()
        for event in await loop.roll_call.find_silent(workers):
            loop.feed(event)

    async def shutdown(self) -> None:
        """End every actor that this coordinator made. `stop_cluster` deletes the saved state."""
        self._background.cancel()
        self._watching.cancel()
        if self._loop is not None:
            self._loop.processes.kill_all()
        logger.info("shut down")

    # --- Running ------------------------------------------------------------------------------------------------

    async def _begin_again(self, config: ServeConfig) -> None:
        """End what was started, and start as if for the first time."""
        self._config = config
        self._background.cancel()
        await self._background.settle()
        if self._loop is not None:
            self._loop.processes.kill_all()
        self._loop, self._error = None, None
        self._opened.clear()
        self._fleet.configure(config)
        self._fleet.clear()
        self._departure.crew.expect(config.api_replicas)
        self._background.start(self._run())

    async def _watch_succession(self) -> None:
        """See whether another cluster is wanted, or another one must give way. Returns when this one has ended."""
        while True:
            await asyncio.sleep(liveness.POLL_S)
            try:
                if await self._is_over():
                    return
                await self._ask_for_way()
            except CALL_ERRORS as error:
                logger.info("the other clusters cannot be seen: %s", one_line(error))

    async def _is_over(self) -> bool:
        replaced = not await asyncio.to_thread(self._fleet.wanted, self._config.data_parallel_size)
        most_s = self._config.shutdown_timeout
        choice = self._departure.look(replaced=replaced, most_s=most_s, now=time.monotonic())
        if not choice.value:
            return False
        logger.info("this cluster ends: %s", choice.reason)
        await self.shutdown()
        await asyncio.to_thread(self._fleet.clear)
        self._fleet.leave()
        return True

    async def _ask_for_way(self) -> None:
        """Have the other clusters give way, if this one is the wanted one and lacks their resources for too long."""
        if self._loop is None or self._departure.replaced:
            return
        facts = self._loop.state.facts
        choice = asks_for_way(
            serves=facts.spec is not None,
            waited_s=self._loop.poller.waited_s(facts, time.monotonic()),
            patience_s=self._config.handover_timeout,
        )
        if choice.value:
            for other in await asyncio.to_thread(self._fleet.others):
                await within(ask(other, Coordinator.give_way), liveness.NOTIFY_TIMEOUT_S)
            self._asked_for_way = True

    async def _run(self) -> None:
        try:
            self._fleet.attach()
            saved = self._saver.load()
            if saved is None or not await self._resume(*saved):
                self._fleet.clear()
                await self._open()
        except (UserError, OSError) as error:
            self._error = one_line(error)
            logger.error("cannot serve %s: %s", self._model_dir, self._error)
            return
        await self._require_loop().run()

    async def _open(self) -> None:
        """Read the checkpoint's description of the model, and begin."""
        model = await asyncio.to_thread(self._fleet.read_model, self._model_dir)
        spec = model_spec(self._config, model, self._model_dir, self._fleet.device())
        state = ControlState(control_settings(self._config, model, shared_gpus=self._fleet.shared_gpus), model)
        self._begin(state, spec, Processes(self._fleet, model.expert_bytes))
        logger.info("%s: %s with %d MoE layers of %d experts, %s on %s", self._model_dir, model.architecture,
                    model.num_layers, model.num_logical_experts, spec.dtype, spec.device)  # fmt: skip

    async def _resume(self, state: ControlState, spec: ModelSpec, config: ServeConfig, memory: SavedSubjects) -> bool:
        """Continue from the state that an earlier coordinator saved. Returns False if it had no epoch yet."""
        # a redeploy may have changed what this coordinator was made with
        self._config = config
        self._fleet.configure(config)
        facts = state.facts
        if facts.spec is None:
            return False
        self._fleet.settle_device(spec.device)
        processes = Processes(self._fleet, state.model.expert_bytes)
        events = processes.adopt(facts.alive)
        # the state cannot take events before the outcome of a flip is known; nothing else is worth waiting for
        flipping = facts.change is not None and facts.change.stage is Stage.COMMITTING
        engine_epoch = await processes.engine_epoch() if flipping else None
        logger.warning(
            "the coordinator was restarted in epoch %d with %s", facts.epoch, counted(len(processes.workers), "worker")
        )
        loop = self._begin(state, spec, processes)
        loop.restore_memory(memory)
        for event in (Resumed(engine_epoch=engine_epoch), *events):
            loop.feed(event)
        return True

    def _begin(self, state: ControlState, spec: ModelSpec, processes: Processes) -> ControlLoop:
        self._loop = ControlLoop(state, spec, processes, self._config, self._fleet, self._saver, self._background.start)
        self._background.start(self.watch.watch())
        self._background.start(keep_collections_short(self._num_under_way))
        self._opened.set()
        return self._loop

    def _num_under_way(self) -> int:
        loop = self._require_loop()
        return loop.poller.status.num_requests + (not loop.state.facts.idle)

    def _has_failed(self, error: BaseException) -> None:
        # a defect of ours: the state will wait for this answer for ever, which /ready has to say
        logger.critical("the control plane failed", exc_info=error)
        self._error = f"the control plane failed: {one_line(error)}"

    def _require_loop(self) -> ControlLoop:
        if self._loop is None:
            raise NotReadyError(self._error or "opening the checkpoint")
        return self._loop
