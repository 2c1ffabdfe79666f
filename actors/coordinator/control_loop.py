"""The control loop: feeds events to ControlState and has its commands carried out.

    polls (polling.py), answers (executor.py, planning.py), requests (coordinator.py)
        -> events -> ControlState -> commands -> executor.py

Everything runs on one event loop, so no event ever meets a state that is half changed. Nothing here decides.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

from ray.exceptions import RayError

from elastic_moe.actors import liveness
from elastic_moe.actors.coordinator.executor import Executor
from elastic_moe.actors.coordinator.fleet import Fleet
from elastic_moe.actors.coordinator.migrator import Migrator
from elastic_moe.actors.coordinator.opening import reconfigured
from elastic_moe.actors.coordinator.planning import Planners
from elastic_moe.actors.coordinator.polling import Poller, RollCall, wait_clause
from elastic_moe.actors.coordinator.processes import Processes
from elastic_moe.actors.coordinator.views import Outline, cluster_view, log_changes, worker_views
from elastic_moe.actors.remote.ask import ask
from elastic_moe.actors.remote.calls import one_line
from elastic_moe.actors.remote.saving import Saver
from elastic_moe.actors.telemetry.exporting import Exporter
from elastic_moe.actors.telemetry.spans import OperationSpans
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.control.state import ControlState
from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.facts.events import (
    Abandon,
    AbortSteps,
    Command,
    Commit,
    Drain,
    Event,
    HomesSeen,
    NodesDrain,
    Prepare,
    Probe,
    RoutingCounted,
    Solve,
    StartWorker,
    StopWorker,
    SubjectChanged,
    Tick,
    Transfer,
    Weigh,
)
from elastic_moe.cluster.facts.routing import RoutingWindow
from elastic_moe.cluster.messages.epochs import ModelSpec
from elastic_moe.cluster.messages.views import ClusterView, Readiness, Revision, WorkerView
from elastic_moe.optimizer.subjects.memory import SavedSubjects, SubjectMemory
from elastic_moe.optimizer.subjects.watch import Sight, SubjectWatch

logger = logging.getLogger(__name__)

P = ParamSpec("P")


class ControlLoop:
    """One per coordinator, made once the model is known."""

    def __init__(
        self,
        state: ControlState,
        spec: ModelSpec,
        processes: Processes,
        config: ServeConfig,
        fleet: Fleet,
        saver: Saver,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        """`saver` keeps the state, the specification and the configuration for a successor.

        `spawn` runs a coroutine beside the others, and reports its failure.
        """
        model = state.model
        heartbeat_timeout_s = config.heartbeat_timeout
        self.state = state
        self.processes = processes
        self.window = RoutingWindow(
            model.num_layers, model.num_logical_experts, window_s=config.rebalance_interval or 60.0
        )
        self.memory = SubjectMemory(model.num_layers, model.num_logical_experts)
        self._remembered_part = -1
        """Number of the last part of the window that the memory has taken."""
        self._saved_memory = SavedSubjects(content=b"")
        self._watch, self._watched = SubjectWatch(), self.window.taken.copy()
        self.roll_call = RollCall(processes, heartbeat_timeout_s)
        self.poller = Poller(
            processes,
            self.window,
            state.counters,
            heartbeat_timeout_s=heartbeat_timeout_s,
            feed=self.feed,
            spawn=spawn,
        )
        self.planners = Planners(
            fleet,
            config,
            model,
            spec.dtype,
            self.window,
            self.memory,
            running_requests=lambda: sum(self.poller.status.running.values()),
            link_gbps=lambda: self.poller.link_gbps,
        )
        self._executor = Executor(fleet, config, model, spec, processes, self.roll_call)
        self._config = config
        self._spec = spec
        self._free_cores: Mapping[str, int] = {}
        """Free cores of each node that has some, as Ray has last reported them."""
        self._looking = False
        """Whether Ray is being asked about its nodes."""
        self._fleet = fleet
        self._saver = saver
        self._spawn = spawn
        self._exporter = Exporter.open(config, "coordinator", config.served_model_name or Path(spec.path).name)
        self._spans = OperationSpans()

    def readiness(self, now: float) -> Readiness:
        readiness = self.state.readiness()
        loading = [record for record in self.state.facts.alive if not record.loaded]
        if readiness.ready or readiness.error or not loading:
            return readiness
        return Readiness(ready=False, reason=f"{readiness.reason}; {self.poller.progress(loading, now)}")

    def workers(self, now: float) -> list[WorkerView]:
        poller = self.poller
        return worker_views(
            self.state,
            poller.status,
            poller.resident,
            poller.link_gbps,
            self.processes.standby,
            self._fleet.device(),
            lambda record: poller.waits_for(record, now),
        )

    def cluster(self, known: Revision, now: float) -> ClusterView:
        """What an open page shows. It takes no call to the engine. `known`: the revision of the page's last answer."""
        serves = self.processes.engine is not None and self.processes.engine_serves
        status = self.poller.status if serves else None
        return cluster_view(self.state, self.window, self.workers(now), status, self.poller.status_at, known, now)

    async def run(self) -> None:
        """Poll once per POLL_S and tick once per TICK_S. Never returns."""
        polled_at = 0.0
        while True:
            now = time.monotonic()
            if now - polled_at >= liveness.POLL_S:
                polled_at = now
                self._poll(now)
            self.feed(Tick())
            await asyncio.sleep(liveness.TICK_S)

    def _poll(self, now: float) -> None:
        self.feed(RoutingCounted(load=self.window.load(now)))
        self._remember(now)
        self._watch_subject(now)
        facts = self.state.facts
        self.poller.poll(facts)
        if not self._looking:
            self._looking = True
            self._spawn(self._look_at_nodes())
        if self.processes.wants_standby and facts.whole and now - facts.epoch_since > liveness.STANDBY_AFTER_S:
            self._spawn(self.processes.start_standby(self.state.next_worker))

    def _remember(self, now: float) -> None:
        """Have the memory of subjects take the parts of the window that are over, and save it."""
        parts = self.window.closed(self._remembered_part, now)
        for number, load in parts:
            self._remembered_part = number
            self.memory.add(load, now)
        if parts:
            self._saved_memory = SavedSubjects(content=self.memory.to_bytes(now))
            self._save()

    def _watch_subject(self, now: float) -> None:
        """Notice the first subject, and a change. Then the window holds the new one only, and the memory keeps the old
        one."""
        new, self._watched = self.window.taken - self._watched, self.window.taken.copy()
        sight = self._watch.look(new) if new.any() else Sight.NOTHING_NEW
        if sight is Sight.CHANGED:
            logger.info("the subject of the traffic has changed")
            self.window.begin_with(self._watch.present, self.state.model.top_k, now)
        if sight is not Sight.NOTHING_NEW:
            self.feed(SubjectChanged(first=sight is Sight.FIRST))

    def restore_memory(self, saved: SavedSubjects) -> None:
        """Take over the subjects that an earlier coordinator remembered."""
        self.memory.restore(saved.content, time.monotonic())
        self._saved_memory = saved

    async def _look_at_nodes(self) -> None:
        """Hear which nodes are about to leave, which have room, and what workers without a process wait for."""
        try:
            if draining := await asyncio.to_thread(self._fleet.draining_nodes):
                self.feed(NodesDrain(nodes=draining))
            free = await asyncio.to_thread(self._fleet.free_cores)
            if free != self._free_cores:
                self._free_cores = free
                self.feed(HomesSeen(free=free))
            waits = self.poller.waits(self.state.facts, time.monotonic())
            self._tell_shortage(await asyncio.to_thread(self._fleet.shortage) if waits else None)
        except RayError as error:
            logger.info("Ray does not answer a question about its nodes: %s", one_line(error))
        finally:
            self._looking = False

    def _tell_shortage(self, shortage: str | None) -> None:
        if shortage is not None and shortage != self.poller.shortage:
            waiting = self.poller.waits(self.state.facts, time.monotonic())
            logger.warning("%s; Ray's autoscaler, if there is one, has been asked", wait_clause(waiting, shortage))
        self.poller.shortage = shortage

    async def configure(self, config: ServeConfig) -> None:
        """Take over the settings of a redeploy.

        Raises PlacementError, before anything is changed, for a number of workers that is not possible.
        """
        bandwidth_changed = config.migration_bandwidth != self._config.migration_bandwidth
        # saved with the state that follows from it
        before, self._config = self._config, config
        try:
            self.feed(reconfigured(config))
        except UserError:
            self._config = before
            raise
        self._fleet.configure(config)
        self.planners.configure(config)
        self._executor.configure(config)
        for timed in (self.roll_call, self.poller):
            timed.timeout_s = config.heartbeat_timeout
        if config.rebalance_interval:
            self.window.window_s = config.rebalance_interval
        if bandwidth_changed and self.processes.migrator is not None:
            await ask(self.processes.migrator, Migrator.limit, 1e6 * config.migration_bandwidth)
        self._save()

    def _save(self) -> None:
        self._saver.save((self.state, self._spec, self._config, self._saved_memory))

    def feed(self, event: Event) -> None:
        """Have the state take an event, and begin to carry out its commands.

        Raises ConflictError, NotReadyError or PlacementError for a request that is refused.
        """
        before = Outline.of(self.state)
        commands = self.state.handle(event, time.monotonic())
        log_changes(before, self.state)
        self._trace_operations()
        if commands or before != Outline.of(self.state):
            # saved before any command is carried out, so that a successor knows what may have been done
            self._save()
        for command in commands:
            self._carry_out(command)

    def _trace_operations(self) -> None:
        if self._exporter is None:
            return
        for span in self._spans.look(self.state.operations.all(), time.time()):
            self._exporter.export(span)

    def _carry_out(self, command: Command) -> None:
        executor = self._executor
        match command:
            case StartWorker():
                self._begin(executor.start_worker, command)
            case StopWorker():
                self.poller.forget(command.worker)
                executor.stop_worker(command)
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
                self._begin(self.planners.answer, command, self.state.facts)
            case Weigh():
                self._begin(self.planners.weigh, command, self.state.facts)

    def _begin(self, work: Callable[P, Awaitable[Sequence[Event]]], *command: P.args, **named: P.kwargs) -> None:
        """Begin `work`, and feed its events when it is done."""

        async def answer() -> None:
            for event in await work(*command, **named):
                self.feed(event)

        self._spawn(answer())
