"""The life of a change: transfer missing experts, drain workers that leave, prepare every worker, commit; or roll back.

`Epochs` owns the epoch in force, an outage of it, and the one change that makes the next epoch, from its beginning to
its end. Other modules decide what to change, and when (cluster/decisions/reconcile.py, cluster/control/rebalancing.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elastic_moe.cluster.facts.adaptation import choose_transport
from elastic_moe.cluster.facts.counters import ClusterCounters, RebalanceResult
from elastic_moe.cluster.facts.events import (
    Abandon,
    AbortSteps,
    Command,
    Commit,
    Prepare,
    Prepared,
    Transfer,
    TransferDone,
    TransferFailed,
)
from elastic_moe.cluster.facts.facts import Cause, Change, ControlSettings, Outage, Stage
from elastic_moe.cluster.facts.membership import Membership
from elastic_moe.cluster.facts.operations import OperationLog
from elastic_moe.cluster.facts.transfers import plan_transfers
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, WorkerInfo
from elastic_moe.cluster.messages.views import Operation, OperationKind, Phase, WorkerState
from elastic_moe.cluster.placement import Placement, WorkerId

MAX_BACKOFF_S = 30.0
"""Longest pause in seconds after a change that failed. The first pause is 0.2 s; each failure in a row doubles it."""
STABLE_S = 30.0
"""Seconds that an epoch must serve before its workers' strikes and the failures before it are forgotten."""


class Epochs:
    def __init__(
        self, settings: ControlSettings, membership: Membership, operations: OperationLog, counters: ClusterCounters
    ) -> None:
        self._settings = settings
        self._membership = membership
        self._operations = operations
        self._counters = counters
        self.spec: EpochSpec | None = None
        """The epoch in force; None before the first."""
        self.goal: Placement | None = None
        """What its placement is to become once all its experts have been brought into devices."""
        self.since = 0.0
        """When the epoch in force began."""
        self.outage: Outage | None = None
        """Why the epoch in force cannot serve; None while it can."""
        self.change: Change | None = None
        self.next_epoch = Epoch(1)
        """Number of the next attempt. No number is used twice."""
        self.retry_at = 0.0
        self._failures = 0
        """Number of changes that failed, each less than STABLE_S after the one before or the beginning of the epoch."""
        self._failed_at = 0.0
        self._next_group = 1
        self._broken_group: str | None = None
        self._read_all = False
        """Whether the next attempt reads every missing expert from the checkpoint, because copies have failed."""

    @property
    def ranks(self) -> tuple[WorkerId, ...]:
        return tuple(worker.id for worker in self.spec.placement.workers) if self.spec else ()

    @property
    def in_use(self) -> set[WorkerId]:
        """Members of the epoch in force and of the next."""
        return {*self.ranks, *(self.change.workers if self.change else ())}

    def is_current(self, epoch: Epoch, stage: Stage) -> bool:
        """Whether the change under way has this epoch and is in this stage. Other answers are stale."""
        return self.change is not None and self.change.spec.epoch == epoch and self.change.stage is stage

    def counts_on(self, worker: WorkerId) -> bool:
        """Whether the change under way must be given up if `worker` is lost."""
        change = self.change
        # during a flip the engine's answer is awaited
        if change is None or change.stage is Stage.COMMITTING:
            return False
        is_source = any(move.source == worker for move in change.transfers.copies)
        return worker in self.in_use or (is_source and change.stage is Stage.TRANSFERRING)

    # --- Forwards -----------------------------------------------------------------------------------------------

    def begin(
        self, operation: Operation, placement: Placement, now: float, *, goal: Placement | None = None
    ) -> list[Command]:
        """The next epoch will be `placement`'s workers and slots. goal: what it is to become; itself if not given."""
        assert self.change is None
        members = self._membership
        transfers = plan_transfers(
            placement,
            has={worker.id: members[worker.id].has for worker in placement.workers},
            sources={worker: members[worker].held for worker in members.loaded},
            read_all=self._read_all,
        )
        spec = self._next_spec(placement)
        urgent = self.spec is None or self.outage is not None
        self.change = Change(
            operation_id=operation.operation_id,
            kind=operation.kind,
            spec=spec,
            goal=placement if goal is None else goal,
            forms_group=self._needs_group(placement),
            transfers=transfers,
            stage=Stage.TRANSFERRING,
            stage_since=now,
            urgent=urgent,
        )
        self.next_epoch = Epoch(self.next_epoch + 1)
        self._next_group += self.change.forms_group
        self._operations.advance(operation.operation_id, phase=Phase.PREPARING, epoch=spec.epoch)
        if transfers:
            hurry = urgent or members.hurries
            return [Transfer(epoch=spec.epoch, copies=transfers.copies, reads=transfers.reads, urgent=hurry)]
        self._enter(Stage.DRAINING, now)
        return []

    def _needs_group(self, placement: Placement) -> bool:
        return self.outage is not None or tuple(worker.id for worker in placement.workers) != self.ranks

    def _next_spec(self, placement: Placement) -> EpochSpec:
        if self.spec is not None and not self._needs_group(placement):
            return replace(self.spec, epoch=self.next_epoch, placement=placement)
        infos = [self._info(worker.id) for worker in placement.workers]
        return EpochSpec(
            epoch=self.next_epoch,
            placement=placement,
            group=f"{self._settings.cluster_id}-{self._next_group}",
            transport=choose_transport(infos, shared_gpus=self._settings.shared_gpus),
            rendezvous="",
        )

    def _infos(self, change: Change) -> dict[WorkerId, WorkerInfo]:
        return {worker: self._info(worker) for worker in change.workers}

    def _info(self, worker: WorkerId) -> WorkerInfo:
        info = self._membership[worker].info
        assert info is not None, f"{worker} has not loaded"
        return info

    def _enter(self, stage: Stage, now: float, **facts: Any) -> None:
        assert self.change is not None
        self._time_stage(self.change, now)
        self.change = replace(self.change, stage=stage, stage_since=now, **facts)

    def _time_stage(self, change: Change, now: float) -> None:
        if change.kind is OperationKind.REBALANCE and change.stage in self._counters.rebalance_s:
            self._counters.rebalance_s[change.stage].add(now - change.stage_since)

    def transferred(self, event: TransferDone | TransferFailed, now: float, *, taken_up: bool = False) -> list[Command]:
        """The transfer of the change has ended. taken_up: as for `give_up`."""
        change = self.change
        if change is None or not self.is_current(event.epoch, Stage.TRANSFERRING):
            return []
        self.change = change = replace(change, nbytes=change.nbytes + event.nbytes)
        if isinstance(event, TransferFailed):
            self._membership.stage(event.staged)
            # a worker's copy may be damaged, and the checkpoint is not
            self._read_all = change.kind is not OperationKind.REBALANCE
            return self.give_up(event.reason, now, taken_up=taken_up)
        self._membership.stage((move.target, move.layer, move.expert) for move in change.transfers.copies)
        self._membership.stage(change.transfers.reads)
        self._enter(Stage.DRAINING, now)
        return []

    def prepare(self, now: float) -> list[Command]:
        """Every expert is in its place, and the workers that leave have finished or used up their time."""
        self._enter(Stage.PREPARING, now)
        assert self.change is not None
        return [Prepare(spec=self.change.spec, forms_group=self.change.forms_group, infos=self._infos(self.change))]

    def prepared(self, event: Prepared, now: float) -> list[Command]:
        if self.change is None or not self.is_current(event.spec.epoch, Stage.PREPARING):
            return []
        self._enter(Stage.COMMITTING, now, spec=event.spec)
        self._operations.advance(self.change.operation_id, phase=Phase.COMMITTING)
        return [Commit(spec=event.spec, infos=self._infos(self.change))]

    def flip(self, now: float, moved_requests: int = 0) -> tuple[Change, list[Command]]:
        """The change's epoch has begun. Returns the change, whose operation the caller ends."""
        change, self.change = self.change, None
        assert change is not None
        self._time_stage(change, now)
        if self.outage is not None and self.outage.cause is not Cause.IDLE:
            self._counters.recoveries[self.outage.cause] += 1
            self._counters.recovery_s.add(now - self.outage.since)
        self._counters.requests_moved += moved_requests
        self._counters.experts_moved += len(change.transfers.copies) + len(change.transfers.reads)
        self._counters.bytes_moved += change.nbytes
        self.spec, self.goal, self.since, self.outage = change.spec, change.goal, now, None
        self.retry_at, self._read_all = 0.0, False
        self._membership.join(change.spec.placement)
        left = [m.id for m in self._membership.alive if m.state is WorkerState.DRAINING and m.id not in self.ranks]
        return change, [self._membership.stop(worker) for worker in left]

    def look_back(self, now: float) -> list[Command]:
        """Report what failed while the flip was under way, because the new epoch may be broken too."""
        assert self.spec is not None
        dead = [worker for worker in self.ranks if not self._membership[worker].alive]
        if dead:
            return self.fail(f"worker {dead[0]} was lost during the flip", Cause.WORKER, now)
        if self._broken_group == self.spec.group:
            return self.fail("a step failed during the flip", Cause.STEP, now)
        return []

    # --- Back ---------------------------------------------------------------------------------------------------

    def commit_failed(
        self, reason: str, now: float, cause: Cause = Cause.FLIP, *, taken_up: bool = False
    ) -> list[Command]:
        """Some workers may have begun the epoch. From now on a worker holds only what it holds in both epochs.
        taken_up: as for `give_up`."""
        assert self.change is not None
        self._membership.doubt(self.change.spec.placement)
        commands: list[Command] = []
        if self.spec is not None:
            commands += self.fail(f"epoch {self.change.spec.epoch} could not begin: {reason}", cause, now)
        return commands + self.give_up(reason, now, taken_up=taken_up)

    def give_up(self, reason: str, now: float, *, at_once: bool = False, taken_up: bool = False) -> list[Command]:
        """Roll the change back. A re-placement or promotion has then failed; anything else is tried again, from what is
        there.

        at_once: the next attempt may begin without a pause, because the cause is known and dealt with. taken_up: this
        re-placement will be tried again too.
        """
        change, self.change = self.change, None
        assert change is not None
        commands: list[Command] = []
        # what was brought for a start or a recovery will be wanted by the next attempt too
        elective = change.kind in (OperationKind.REBALANCE, OperationKind.PROMOTE)
        # unless it takes memory that a disk tier makes do with: then a new attempt begins with what is counted on
        tiered = any(self._membership[worker].tiered for worker in change.workers)
        if elective or tiered or change.stage in (Stage.PREPARING, Stage.COMMITTING):
            workers = tuple(worker for worker in change.workers if self._membership[worker].alive)
            self._membership.unstage(workers)
            commands.append(Abandon(epoch=change.spec.epoch, workers=workers))
        if elective and not taken_up:
            self._operations.fail(change.operation_id, reason)
            self._counters.rebalances[RebalanceResult.FAILED] += change.kind is OperationKind.REBALANCE
        else:
            self._operations.advance(change.operation_id, phase=Phase.PREPARING)
            self._operations.note_error(change.operation_id, reason)
        self._open_recovery()
        if not at_once:
            self._failures += 1
            self._failed_at = now
            self.retry_at = now + min(MAX_BACKOFF_S, 0.1 * 2.0 ** min(self._failures, 10))
        return commands

    def fail(self, reason: str, cause: Cause, now: float) -> list[Command]:
        """The epoch in force cannot serve any more. The next one needs a new process group."""
        assert self.spec is not None
        self._broken_group = self.spec.group
        if self.outage is not None and self.outage.cause is Cause.IDLE and self.change is None:
            # there is nobody whose end could matter
            return []
        # the engine aborts steps as well, unless it is dead too
        epochs = [self.spec.epoch]
        if self.change is not None and self.change.stage is Stage.COMMITTING:
            epochs.append(self.change.spec.epoch)
        abort = AbortSteps(epochs=tuple(epochs), workers=self._membership.loaded)
        if self.outage is None:
            self.outage = Outage(reason=reason, cause=cause, since=now)
        elif (self.outage.cause, cause) == (Cause.STEP, Cause.WORKER):
            # the step failed because a worker died
            self.outage = replace(self.outage, cause=cause)
        self._open_recovery()
        return [abort]

    def rest(self, now: float) -> None:
        """No worker is kept. The epoch in force has served, and the next one needs a new process group."""
        assert self.spec is not None
        self._broken_group = self.spec.group
        self.outage = Outage(reason="there was no request for long", cause=Cause.IDLE, since=now)

    def _open_recovery(self) -> None:
        # while a change is under way, its outcome decides whether a recovery is needed
        if self.outage is None or self.outage.cause is Cause.IDLE or self.change is not None:
            return
        if self._operations.find_open(OperationKind.RECOVER) is None:
            self._operations.open(OperationKind.RECOVER, self.next_epoch, self.outage.reason)

    # --- Time ---------------------------------------------------------------------------------------------------

    def is_stable(self, now: float) -> bool:
        """Whether the epoch in force has served for STABLE_S, so that earlier failures can be forgotten."""
        return self.spec is not None and self.outage is None and now - self.since >= STABLE_S

    def forgive(self, now: float) -> None:
        """Forget failures, unless there was one lately: attempts may go on failing beside an epoch that serves."""
        if now - self._failed_at >= STABLE_S:
            self._failures = 0

    def resume(self, now: float) -> None:
        """Set all times by the clock of a restarted coordinator."""
        self.since, self._failed_at, self.retry_at = now, now, 0.0
        if self.outage is not None:
            self.outage = replace(self.outage, since=now)
        if self.change is not None:
            self.change = replace(self.change, stage_since=now)
