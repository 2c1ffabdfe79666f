"""ControlState: the decisions of the control plane. Events in, commands out; no Ray, no torch, no clock.

There is one mechanism for a start, a re-placement, scaling and a death: the next epoch is made from the workers that
are there and a placement (cluster/control/change.py carries it out). After every event, the state of the cluster is
compared with the wanted state (cluster/control/reconcile.py), and if they differ, a change begins. Only one change runs
at a time. Each attempt has its own epoch number, and an answer with another number is stale.

Each fact has one owner (cluster/facts/facts.py lists them). Here events are passed to the owners that they are about,
and the effects of one owner's act are passed on to the other owners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.control import draining, joining, reconcile, status
from elastic_moe.cluster.control.change import Epochs
from elastic_moe.cluster.control.draining import Draining, drained, leavers, notice
from elastic_moe.cluster.control.rebalancing import Rebalancing
from elastic_moe.cluster.control.scaling import Scaling
from elastic_moe.cluster.control.starting import Starts
from elastic_moe.cluster.errors import ConflictError, NotReadyError
from elastic_moe.cluster.facts.counters import ClusterCounters
from elastic_moe.cluster.facts.events import (
    Command,
    CommitFailed,
    Committed,
    EngineLost,
    Event,
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
    WorkerFailed,
    WorkerLoaded,
    WorkerLost,
)
from elastic_moe.cluster.facts.facts import Cause, Change, ControlSettings, Facts, Stage
from elastic_moe.cluster.facts.membership import Membership
from elastic_moe.cluster.facts.operations import OperationLog
from elastic_moe.cluster.messages.epochs import Epoch, ModelInfo
from elastic_moe.cluster.messages.views import Operation, OperationKind, Phase, Readiness, ScaleView, WorkerState
from elastic_moe.cluster.placement import Placement, WorkerId

MAX_STRIKES = 3
"""Number of failed steps in a row after which their suspect is replaced although it answers pings."""


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
        self.settings = settings
        self.model = model
        self.operations = OperationLog()
        self.counters = ClusterCounters()
        shape = (model.num_layers, model.num_logical_experts)
        self.reasons = Reasons()
        self._load: npt.NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
        self._membership = Membership(shape)
        self._starts = Starts()
        self._draining = Draining()
        self._epochs = Epochs(settings, self._membership, self.operations, self.counters)
        self._rebalancing = Rebalancing(settings, self.operations, self.counters)
        self._scaling = Scaling(settings, model, self._membership, self.operations)
        self._redeployed: ControlSettings | None = None
        """Settings of a redeploy that are taken over once no change is under way."""
        self.operations.open(OperationKind.START, Epoch(1), f"start with {settings.workers} workers")

    # --- What others may ask ------------------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        """The facts as they are now. Later events make new facts and do not change these."""
        epochs, membership = self._epochs, self._membership
        return Facts(
            settings=self.settings,
            model=self.model,
            records=membership.records,
            probing=membership.probing,
            busy=self._draining.busy,
            spec=epochs.spec,
            goal=epochs.goal,
            epoch_since=epochs.since,
            outage=epochs.outage,
            change=epochs.change,
            next_epoch=epochs.next_epoch,
            planning=self._rebalancing.planning,
            pinned=self._rebalancing.pinned,
            target=self._scaling.target,
            load=self._load,
            retry_at=epochs.retry_at,
            start_at=self._starts.at,
            fatal=self._starts.fatal,
        )

    @property
    def next_worker(self) -> WorkerId:
        """The name of the worker that will be started next."""
        return self._membership.next_worker

    def readiness(self) -> Readiness:
        kind = OperationKind.START if self._epochs.spec is None else OperationKind.RECOVER
        return status.readiness(self.facts, self.operations.find_open(kind))

    def progress(self, operation: Operation) -> status.Progress:
        return status.progress(self.facts, operation)

    def view(self) -> ScaleView:
        return self._scaling.view(self.facts)

    # --- Events -------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; return what is to be done, in order.

        Raises ConflictError, NotReadyError or PlacementError for a request that is refused; nothing has changed then.
        """
        commands = self._take(event, now)
        if isinstance(event, RoutingCounted):
            return commands
        commands += self._take_over(now)
        commands += self._go_on(now)
        commands += self._reconcile(now)
        commands += self._promote(now)
        return commands + self._draining.spare(self.facts)

    def _take(self, event: Event, now: float) -> list[Command]:
        match event:
            case Tick():
                return self._tick(now)
            case WorkerLoaded() | WorkerFailed() | WorkerLost():
                return self._worker_reported(event, now)
            case TransferDone() | TransferFailed():
                return self._epochs.transferred(event, now)
            case Prepared():
                return self._epochs.prepared(event, now)
            case PrepareFailed() | Committed() | CommitFailed():
                return self._change_ended(event, now)
            case StepFailed():
                return self._step_failed(event, now)
            case Probed():
                self._membership.probed()
                return [command for worker, reason in event.lost for command in self._lose(worker, reason, now)]
            case EngineLost():
                return self._engine_lost(event.reason, now)
            case Resumed():
                return self._resumed(event, now)
            case Reconfigured():
                self._reconfigured(event)
                return []
            case NodesDrain():
                return self._nodes_drain(event, now)
            case LoadSeen():
                self._draining.seen(event.busy)
                return self._scaling.load_seen(self.facts, event, now)
            case RoutingCounted():
                self._load = event.load
                return []
            case SubjectChanged():
                return self._rebalancing.subject_changed(self.facts, now)
            case Unpin():
                self._rebalancing.unpin()
                return []
            case PlanReady() | PlaceRequested() | RebalanceRequested() | ScaleRequested():
                return self._wished(event, now)

    def _wished(
        self, event: PlanReady | PlaceRequested | RebalanceRequested | ScaleRequested, now: float
    ) -> list[Command]:
        """A planner or a user wants another placement or another number of workers."""
        match event:
            case PlanReady():
                return self._begin(self._rebalancing.answered(self.facts, event, now), now)
            case PlaceRequested():
                self._require_idle()
                return self._begin(self._rebalancing.place(self.facts, event), now)
            case RebalanceRequested():
                self._require_idle()
                commands = self._give_way("a planner was asked for", now)
                return commands + self._rebalancing.requested(self.facts, event, now)
            case ScaleRequested():
                if self._scaling.is_repeated(event):
                    return []
                if not (self.facts.rests and not self.facts.target):
                    self._require_idle()
                return self._scaling.requested(self.facts, event, now)

    def _begin(self, change: tuple[Operation, Placement] | None, now: float) -> list[Command]:
        """Begin the change that ends in the given placement, at once or by a later promotion."""
        if change is None:
            return []
        operation, goal = change
        commands = self._give_way(operation.reason, now)
        # nothing is served meanwhile: what is lost is soon there, or is read from disk when it is needed
        budget_s = reconcile.READ_FIRST_S if self._epochs.outage is not None else None
        return commands + self._epochs.begin(operation, reconcile.step_to(self.facts, goal, budget_s), now, goal=goal)

    def _give_way(self, reason: str, now: float) -> list[Command]:
        """End a promotion for something else."""
        change = self._epochs.change
        if change is None or not change.yields:
            return []
        return self._epochs.give_up(f"it gave way: {reason}", now, at_once=True)

    def _require_idle(self) -> None:
        change = self._epochs.change
        running = self._rebalancing.planning if change is None or change.yields else change
        if running is not None:
            raise ConflictError(f"operation {running.operation_id} is under way")
        if not self.facts.serves or self._membership.probing:
            raise NotReadyError(self.readiness().reason)

    def _tick(self, now: float) -> list[Command]:
        if self._epochs.is_stable(now):
            self._epochs.forgive(now)
            self._membership.forgive()
        return self._rebalancing.tick(self.facts, now)

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
        self._scaling.check(self.facts, settings)
        self._redeployed = settings

    def _take_over(self, now: float) -> list[Command]:
        """Take over the settings of a redeploy, once nothing is under way that they could cut across."""
        settings, facts = self._redeployed, self.facts
        starts = (facts.spec is None or facts.rests) and facts.change is None
        if settings is None or not (starts or (facts.serves and facts.interruptible)):
            return []
        commands = self._give_way("the server was redeployed", now)
        self._redeployed = None
        self._rebalancing.configured(settings, now)
        commands += self._scaling.configured(self.facts, settings, now)
        self.settings = settings
        return commands

    # --- Workers ------------------------------------------------------------------------------------------------

    def _nodes_drain(self, event: NodesDrain, now: float) -> list[Command]:
        """Retire the workers on nodes that leave. Others take their place where there is room for them."""
        facts = self.facts
        found = leavers(facts, event.nodes)
        commands: list[Command] = []
        members = [leaver for leaver in found if leaver.worker in self._epochs.in_use]
        for leaver in found:
            leave_by = None if leaver.left_s is None else now + leaver.left_s
            if leaver in members:
                self._membership.drain(leaver.worker, now, retired=True, leave_by=leave_by)
            else:
                # it holds nothing that others need
                commands.append(self._membership.stop(leaver.worker))
        fresh = tuple(m.worker for m in members if facts.records[m.worker].state is not WorkerState.DRAINING)
        if fresh:
            commands += self._make_haste(notice(members), now)
        if fresh and self.operations.find_open(OperationKind.SCALE) is None:
            self.operations.open(OperationKind.SCALE, facts.next_epoch, notice(members), retiring=fresh)
        return commands

    def _make_haste(self, reason: str, now: float) -> list[Command]:
        """End a re-placement: what it moves would keep a leaving node's experts waiting."""
        self._rebalancing.cancel(reason)
        change = self._epochs.change
        elective = change is not None and change.kind in (OperationKind.REBALANCE, OperationKind.PROMOTE)
        if change is None or not elective or change.stage is Stage.COMMITTING:
            return []
        return self._epochs.give_up(reason, now, at_once=True)

    def _worker_reported(self, event: WorkerLoaded | WorkerFailed | WorkerLost, now: float) -> list[Command]:
        if isinstance(event, WorkerLoaded):
            if self._membership.loads(event.info, now):
                self._starts.succeeded()
                self._check_memory()
            return []
        if isinstance(event, WorkerFailed) and event.fatal and self._epochs.spec is None:
            self._give_in(event.reason)
        return self._lose(event.worker, event.reason, now)

    def _lose(self, worker: WorkerId, reason: str, now: float) -> list[Command]:
        """A worker is gone: give up the change that needs it. `_reconcile` then continues without the worker."""
        record = self._membership.get(worker)
        if record is None or not record.alive:
            return []
        if not record.loaded:
            lasting = self._starts.failed(worker, reason, now)
            if lasting is not None and self._epochs.spec is None:
                self._give_in(lasting)
        commands: list[Command] = [self._membership.stop(worker)]
        if worker in self._epochs.ranks:
            commands += self._epochs.fail(f"worker {worker} lost: {reason}", Cause.WORKER, now)
            self._rebalancing.cancel(f"worker {worker} was lost")
        if self._epochs.counts_on(worker):
            commands += self._epochs.give_up(f"worker {worker} lost: {reason}", now, at_once=True)
        self._membership.forget_dead(self._epochs.in_use)
        return commands

    def _check_memory(self) -> None:
        """Before the first epoch: give in if all workers have loaded and cannot serve every expert."""
        facts = self.facts
        if facts.spec is None and len(facts.loaded) == facts.target and not facts.fits(facts.loaded):
            limits, experts = ", ".join(map(str, facts.limits(facts.loaded))), facts.model.num_logical_experts
            self._give_in(
                f"a layer has {experts} experts, and the workers, which cannot serve experts from disk, have memory for"
                f" {limits}: raise --workers or --expert-memory-bytes"
            )

    def _give_in(self, reason: str) -> None:
        """There will never be a first epoch."""
        if self._starts.fatal is None:
            self._starts.give_in(reason)
            self.operations.fail_open(reason)

    def _step_failed(self, event: StepFailed, now: float) -> list[Command]:
        if self._epochs.spec is None or event.epoch != self._epochs.spec.epoch:
            return []
        commands: list[Command] = [] if self._membership.probing else [self._membership.probe()]
        if self._epochs.outage is None:
            commands += self._suspect(event.suspects, now)
        return commands + self._interrupt(f"a step failed: {event.reason}", Cause.STEP, now)

    def _suspect(self, suspects: Sequence[WorkerId], now: float) -> list[Command]:
        """Replace a worker that answers probes but is a suspect in several failed steps in a row."""
        commands: list[Command] = []
        for worker in suspects:
            strikes = self._membership.strike(worker)
            if strikes >= MAX_STRIKES:
                commands += self._lose(worker, f"to blame for {strikes} failed steps", now)
        return commands

    # --- The epoch in force, and the change of it -----------------------------------------------------------------

    def _interrupt(self, reason: str, cause: Cause, now: float) -> list[Command]:
        """The epoch in force cannot serve: give up every change that is not a recovery."""
        commands = self._epochs.fail(reason, cause, now)
        self._rebalancing.cancel(reason)
        change = self._epochs.change
        if change is not None and change.stage is not Stage.COMMITTING and change.kind is not OperationKind.RECOVER:
            commands += self._epochs.give_up(reason, now, at_once=True)
        return commands

    def _engine_lost(self, reason: str, now: float) -> list[Command]:
        self._draining.engine_lost()
        if self.facts.rests and not self.facts.target:
            # requests have nobody to wait at
            return self._scaling.wake(self.facts, f"the engine is lost: {reason}", now)
        reason = f"the engine is lost: {reason}"
        if self._epochs.change is not None and self._epochs.change.stage is Stage.COMMITTING:
            return self._epochs.commit_failed(reason, now, Cause.ENGINE)
        return [] if self._epochs.spec is None else self._interrupt(reason, Cause.ENGINE, now)

    def _resumed(self, event: Resumed, now: float) -> list[Command]:
        """Continue from a saved state. The old clock and the answers under way are lost."""
        why = "the coordinator was restarted"
        self.counters.recoveries[Cause.COORDINATOR] += 1
        self._starts.resume()
        self._scaling.resume(now)
        self._draining.resume()
        self._rebalancing.resume(now)
        self._rebalancing.cancel(why)
        self._epochs.resume(now)
        # a worker that is asked again loads no second time
        commands: list[Command] = [*self._membership.resume(now)]
        change = self._epochs.change
        if change is not None and change.stage is not Stage.COMMITTING:
            commands += self._epochs.give_up(why, now, at_once=True)
        elif change is not None and change.spec.epoch == event.engine_epoch:
            commands += self._committed(now)
        elif change is not None:
            commands += self._epochs.commit_failed(why, now)
        return [*commands, self._membership.probe()]

    def _change_ended(self, event: PrepareFailed | Committed | CommitFailed, now: float) -> list[Command]:
        stage = Stage.PREPARING if isinstance(event, PrepareFailed) else Stage.COMMITTING
        if not self._epochs.is_current(event.epoch, stage):
            return []
        match event:
            case Committed():
                return self._committed(now, event.moved_requests)
            case PrepareFailed():
                return self._could_not_join(event.reason, now)
            case CommitFailed():
                return self._epochs.commit_failed(event.reason, now)

    def _could_not_join(self, reason: str, now: float) -> list[Command]:
        """The group of the change could not form. A worker that keeps failing to join others that serve is ended."""
        change = self._epochs.change
        assert change is not None
        commands = self._epochs.give_up(reason, now)
        if not change.forms_group:
            return commands
        for worker in joining.blamed(self.facts, change.workers):
            attempts = self._membership.failed_to_join(worker)
            if attempts < joining.MAX_JOINS or not self.facts.serves:
                continue
            why = f"{worker} could not join the others in {attempts} attempts: {reason}"
            operation = self.operations.find_open(OperationKind.SCALE)
            if operation is not None:
                self.operations.fail(operation.operation_id, why)
            self._starts.could_not_join(now)
            commands += self._lose(worker, why, now)
        return commands

    def _committed(self, now: float, moved_requests: int = 0) -> list[Command]:
        change, commands = self._epochs.flip(now, moved_requests)
        self._rebalancing.changed(change, now)
        if change.forms_group and len(change.workers) > 1:
            self._starts.joined()
        self._end_operations(change)
        commands += self._epochs.look_back(now)
        self._membership.forget_dead(self._epochs.in_use)
        return commands

    def _end_operations(self, change: Change) -> None:
        """End the operations that the new epoch completes."""
        facts, operations = self.facts, self.operations
        operation = operations.get(change.operation_id)
        assert operation is not None
        if operation.operation_id == self._scaling.operation_id and not facts.scaled:
            # some workers are still to come
            operations.advance(operation.operation_id, phase=Phase.PREPARING)
        else:
            moved = f"{len(change.transfers.copies)} experts copied, {len(change.transfers.reads)} read"
            done = f"{operation.reason}; epoch {facts.epoch} with {len(facts.ranks)} workers, {moved}"
            operations.complete(operation.operation_id, done)
        scaling = operations.find_open(OperationKind.SCALE)
        if scaling is not None and facts.scaled:
            # a recovery has brought it about
            operations.complete(scaling.operation_id, f"{scaling.reason}; epoch {facts.epoch}")

    # --- What should be -----------------------------------------------------------------------------------------

    def _go_on(self, now: float) -> list[Command]:
        """Prepare the next epoch, once the workers that leave have finished or used up their time."""
        facts = self.facts
        if facts.change is None or facts.change.stage is not Stage.DRAINING:
            return []
        choice = drained(facts, now)
        self.reasons = self.reasons._replace(drained=choice.reason)
        return self._epochs.prepare(now) if choice.value else []

    def _reconcile(self, now: float) -> list[Command]:
        """Start workers and begin a change if the cluster is not as it should be."""
        if self._starts.fatal:
            return []
        for worker in reconcile.kept(self.facts):
            self._membership.keep(worker)
        if draining.may_rest(self.facts):
            return self._rest(now)
        starts = reconcile.starts(self.facts, now)
        commands: list[Command] = [self._membership.start(assigned, now) for assigned in starts.value]
        facts = self.facts
        members = reconcile.next_members(facts, now)
        self.reasons = self.reasons._replace(starts=starts.reason, members=members.reason)
        if not members.value:
            return commands
        self._rebalancing.cancel("the membership changes")
        wish = reconcile.wish(facts, members.value)
        operation = self.operations.find_open(wish.value)
        if operation is None:
            operation = self.operations.open(wish.value, facts.next_epoch, wish.reason)
        commands += self._begin((operation, reconcile.placement_for(facts, members.value)), now)
        return commands + self._go_on(now)

    def _rest(self, now: float) -> list[Command]:
        """Keep no worker, since there are no requests."""
        self._rebalancing.cancel("there are no requests")
        commands: list[Command] = [self._membership.stop(record.id) for record in self._membership.alive]
        self._epochs.rest(now)
        scaling = self.operations.find_open(OperationKind.SCALE)
        if scaling is not None:
            self.operations.complete(scaling.operation_id, f"{scaling.reason}; no worker is kept")
        return commands

    def _promote(self, now: float) -> list[Command]:
        """Bring experts that are served from disk into devices, beside the serving."""
        if self._starts.fatal:
            return []
        choice = reconcile.promotion(self.facts, now)
        self.reasons = self.reasons._replace(promotion=choice.reason)
        if choice.value is None:
            return []
        operation = self.operations.open(OperationKind.PROMOTE, self._epochs.next_epoch, choice.reason)
        commands = self._epochs.begin(operation, choice.value, now, goal=self._epochs.goal)
        return commands + self._go_on(now)
