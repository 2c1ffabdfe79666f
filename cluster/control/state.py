"""ControlState: the decisions of the control plane. Events in, commands out; no Ray, no torch, no clock.

There is one mechanism for a start, a re-placement, scaling and a death: the next epoch is made from the workers that
are there and a placement (cluster/control/change.py carries it out). After every event, the state of the cluster is
compared with the wanted state (cluster/decisions/reconcile.py), and if they differ, a change begins. Only one change
runs at a time. Each attempt has its own epoch number, and an answer with another number is stale.

Each fact has one owner (cluster/control/owners.py; cluster/facts/facts.py lists the facts). Here events are passed on:
to an owner, or to one of the three that know what an event means for several owners: losses.py, transitions.py and
upkeep.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from elastic_moe.cluster.control.losses import Losses
from elastic_moe.cluster.control.owners import Owners
from elastic_moe.cluster.control.transitions import Transitions
from elastic_moe.cluster.control.upkeep import Upkeep
from elastic_moe.cluster.decisions import status
from elastic_moe.cluster.errors import NotReadyError
from elastic_moe.cluster.facts.counters import ClusterCounters
from elastic_moe.cluster.facts.events import (
    Command,
    CommitFailed,
    Committed,
    EngineLost,
    Event,
    HomesSeen,
    LoadSeen,
    NodesDrain,
    PlaceRequested,
    PlanReady,
    Prepared,
    PrepareFailed,
    Probed,
    RebalanceRequested,
    Reconfigured,
    Resumed,
    RoutingCounted,
    ScaleRequested,
    StepFailed,
    SubjectChanged,
    Tick,
    TransferDone,
    TransferFailed,
    Unpin,
    Weighed,
    WorkerFailed,
    WorkerLoaded,
    WorkerLost,
)
from elastic_moe.cluster.facts.facts import Cause, ControlSettings, Facts, Stage
from elastic_moe.cluster.facts.operations import OperationLog
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.epochs import Epoch, ModelInfo
from elastic_moe.cluster.messages.views import Operation, OperationKind, Readiness, ScaleView
from elastic_moe.cluster.placement import WorkerId


class Reasons(NamedTuple):
    """The reasons of the last decisions, for the log."""

    starts: str = ""
    """Why workers are started, or none."""
    members: str = ""
    """Why an epoch is begun, or none."""
    drained: str = ""
    """Why the change under way goes on, or waits for those that leave."""
    promotion: str = ""
    """Why experts are brought into devices, or are not."""


class ControlState:
    """See the module's docstring. Raises PlacementError for more workers than experts."""

    def __init__(self, settings: ControlSettings, model: ModelInfo) -> None:
        self._owners = Owners(settings, model)
        self._transitions = Transitions(self._owners)
        self._losses = Losses(self._owners, self._transitions)
        self._upkeep = Upkeep(self._owners, self._transitions)
        self._redeployed: ControlSettings | None = None
        """Settings of a redeploy that are taken over once no change is under way."""
        self.operations.open(OperationKind.START, Epoch(1), f"start with {counted(settings.workers, 'worker')}")

    # --- What others may ask ------------------------------------------------------------------------------------

    @property
    def settings(self) -> ControlSettings:
        return self._owners.settings

    @property
    def model(self) -> ModelInfo:
        return self._owners.model

    @property
    def operations(self) -> OperationLog:
        return self._owners.operations

    @property
    def counters(self) -> ClusterCounters:
        return self._owners.counters

    @property
    def facts(self) -> Facts:
        """The facts as they are now. Later events make new facts and do not change these."""
        return self._owners.facts

    @property
    def reasons(self) -> Reasons:
        """The reasons of the last decisions."""
        upkeep = self._upkeep
        return Reasons(
            starts=upkeep.starts,
            members=upkeep.members,
            drained=self._transitions.drained,
            promotion=upkeep.promotion,
        )

    @property
    def next_worker(self) -> WorkerId:
        """The name of the worker that will be started next."""
        return self._owners.membership.next_worker

    def readiness(self) -> Readiness:
        kind = OperationKind.START if self._owners.epochs.spec is None else OperationKind.RECOVER
        return status.readiness(self.facts, self.operations.find_open(kind))

    def progress(self, operation: Operation) -> status.Progress:
        return status.progress(self.facts, operation)

    def view(self) -> ScaleView:
        return self._owners.scaling.view(self.facts)

    # --- Events -------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; return what is to be done, in order.

        Raises ConflictError, NotReadyError or PlacementError for a request that is refused; nothing has changed then.
        """
        commands = self._take(event, now)
        if isinstance(event, RoutingCounted):
            return commands
        commands += self._take_over(now)
        # before the members change: a placement that was asked for is one of those that there were
        again, change = self._owners.rebalancing.take_up(self.facts, now)
        commands += again + self._transitions.begin(change, now)
        commands += self._transitions.go_on(now)
        commands += self._upkeep.reconcile(now)
        commands += self._upkeep.promote(now)
        return commands + self._owners.draining.spare(self.facts)

    def _take(self, event: Event, now: float) -> list[Command]:
        match event:
            case Tick():
                return self._tick(now)
            case WorkerLoaded() | WorkerFailed() | WorkerLost():
                return self._losses.worker_reported(event, now)
            case TransferDone() | TransferFailed():
                return self._transitions.transferred(event, now)
            case Prepared():
                return self._owners.epochs.prepared(event, now)
            case PrepareFailed() | Committed() | CommitFailed():
                return self._change_ended(event, now)
            case StepFailed():
                return self._losses.step_failed(event, now)
            case Probed():
                return self._losses.probed(event, now)
            case EngineLost():
                return self._engine_lost(event.reason, now)
            case Resumed():
                return self._resumed(event, now)
            case Reconfigured():
                self._reconfigured(event)
                return []
            case NodesDrain():
                return self._losses.nodes_drain(event, now)
            case HomesSeen():
                self._owners.homes.seen(event.free, now)
                return []
            case LoadSeen():
                self._owners.draining.seen(event.busy)
                return self._owners.scaling.load_seen(self.facts, event, now)
            case RoutingCounted():
                self._owners.load = event.load
                return []
            case SubjectChanged():
                return self._owners.rebalancing.subject_changed(self.facts, event, now)
            case Unpin():
                self._owners.rebalancing.unpin()
                return []
            case Weighed():
                return self._transitions.begin(self._owners.undoing.weighed(self.facts, event, now), now)
            case PlanReady() | PlaceRequested() | RebalanceRequested() | ScaleRequested():
                return self._wished(event, now)

    def _wished(
        self, event: PlanReady | PlaceRequested | RebalanceRequested | ScaleRequested, now: float
    ) -> list[Command]:
        """A planner or a user wants another placement or another number of workers."""
        match event:
            case PlanReady():
                return self._transitions.begin(self._owners.rebalancing.answered(self.facts, event, now), now)
            case PlaceRequested():
                self._require_idle()
                self._require_no_scaling()
                return self._transitions.begin(self._owners.rebalancing.place(self.facts, event), now)
            case RebalanceRequested():
                self._require_idle()
                self._require_no_scaling()
                commands = self._transitions.give_way("a planner was asked for", now)
                return commands + self._owners.rebalancing.requested(self.facts, event, now)
            case ScaleRequested():
                if self._owners.scaling.is_repeated(event):
                    return []
                if not (self.facts.rests and not self.facts.target):
                    self._require_idle(unless_own=True)
                return self._owners.scaling.requested(self.facts, event, now)

    def _require_no_scaling(self) -> None:
        """Raises ConflictError while a scaling waits for its workers: when they come, they would end a re-placement."""
        scaling = self.operations.find_open(OperationKind.SCALE)
        if scaling is not None:
            raise self.operations.conflict(scaling.operation_id)

    def _require_idle(self, *, unless_own: bool = False) -> None:
        """Raises ConflictError while something is under way that does not give way, and NotReadyError where nothing is
        served. unless_own: a re-placement or promotion that nobody asked for is no conflict, since it may end first."""
        change = self._owners.epochs.change
        running = self._owners.rebalancing.planning if change is None or change.yields else change
        if running is not None and not (unless_own and self._is_own(running.operation_id)):
            raise self.operations.conflict(running.operation_id)
        if not self.facts.serves:
            raise NotReadyError(self.readiness().reason)
        if self._owners.membership.probing:
            raise NotReadyError("the coordinator was started again and is asking the workers what they have")

    def _is_own(self, operation_id: str) -> bool:
        operation = self.operations.get(operation_id)
        elective = (OperationKind.REBALANCE, OperationKind.PROMOTE)
        return operation is not None and operation.kind in elective and not operation.asked

    def _tick(self, now: float) -> list[Command]:
        if self._owners.epochs.is_stable(now):
            self._owners.epochs.forgive(now)
            self._owners.membership.forgive()
        commands = self._owners.undoing.tick(self.facts, now)
        # a look at the whole placement waits until it is known whether the last change is undone
        return commands if self._owners.undoing.weighing else self._owners.rebalancing.tick(self.facts, now)

    # --- A redeploy ---------------------------------------------------------------------------------------------

    def _reconfigured(self, event: Reconfigured) -> None:
        """Raises PlacementError before anything is changed."""
        settings = replace(
            self.settings,
            workers=event.workers,
            min_workers=event.min_workers,
            max_workers=event.max_workers,
            autoscale_window_s=event.autoscale_window_s,
            rebalance_interval_s=event.rebalance_interval_s,
            drain_timeout_s=event.drain_timeout_s,
        )
        self._owners.scaling.check(self.facts, settings)
        self._redeployed = settings

    def _take_over(self, now: float) -> list[Command]:
        """Take over the settings of a redeploy, once nothing is under way that they could cut across."""
        settings, facts = self._redeployed, self.facts
        starts = (facts.spec is None or facts.rests) and facts.change is None
        if settings is None or not (starts or (facts.serves and facts.interruptible)):
            return []
        commands = self._transitions.give_way("the server was redeployed", now)
        self._redeployed = None
        self._owners.rebalancing.configured(settings, now)
        self._owners.undoing.configured(settings)
        commands += self._owners.scaling.configured(self.facts, settings, now)
        self._owners.settings = self._owners.scaling.settings
        return commands

    # --- The epoch in force, and the change of it -----------------------------------------------------------------

    def _engine_lost(self, reason: str, now: float) -> list[Command]:
        self._owners.draining.engine_lost()
        if self.facts.rests and not self.facts.target:
            # requests have nobody to wait at
            return self._owners.scaling.wake(self.facts, f"the engine is lost: {reason}", now)
        reason = f"the engine is lost: {reason}"
        if self._owners.epochs.change is not None and self._owners.epochs.change.stage is Stage.COMMITTING:
            return self._transitions.commit_failed(reason, now, Cause.ENGINE)
        return [] if self._owners.epochs.spec is None else self._transitions.interrupt(reason, Cause.ENGINE, now)

    def _resumed(self, event: Resumed, now: float) -> list[Command]:
        """Continue from a saved state. The old clock and the answers under way are lost."""
        why = "the coordinator was restarted"
        self.counters.recoveries[Cause.COORDINATOR] += 1
        self._owners.starts.resume()
        self._owners.homes.resume(now)
        self._owners.scaling.resume(now)
        self._owners.draining.resume()
        self._owners.undoing.resume(now)
        self._owners.epochs.resume(now)
        # a worker that is asked again loads no second time
        commands: list[Command] = [*self._owners.membership.resume(now)]
        change = self._owners.epochs.change
        self._owners.rebalancing.resume(now)
        if change is None:
            self._owners.rebalancing.interrupted(why, None, now)
        elif change.stage is not Stage.COMMITTING:
            commands += self._transitions.give_up(why, now, at_once=True)
        elif change.spec.epoch == event.engine_epoch:
            commands += self._transitions.committed(now)
        else:
            commands += self._transitions.commit_failed(why, now)
        return [*commands, self._owners.membership.probe()]

    def _change_ended(self, event: PrepareFailed | Committed | CommitFailed, now: float) -> list[Command]:
        stage = Stage.PREPARING if isinstance(event, PrepareFailed) else Stage.COMMITTING
        if not self._owners.epochs.is_current(event.epoch, stage):
            return []
        match event:
            case Committed():
                return self._transitions.committed(now, event.moved_requests)
            case PrepareFailed():
                return self._losses.could_not_join(event.reason, now)
            case CommitFailed():
                return self._transitions.commit_failed(event.reason, now)
