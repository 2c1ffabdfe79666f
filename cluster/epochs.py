"""The life of a change: transfer what is missing, prepare every host, commit through the engine, drop the rest.

`Epochs` holds what is true now (members, current epoch, operations) and carries one change from its beginning to its
end, or back. What to change, and when, is decided in cluster/state.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from cluster.counters import ClusterCounters
from cluster.events import (
    Abandon,
    AbortSteps,
    Command,
    Commit,
    Drain,
    Prepare,
    Prepared,
    StopWorker,
    Transfer,
    TransferDone,
    TransferFailed,
)
from cluster.membership import Member, WorkerState, choose_transport, needs
from cluster.messages.epochs import Epoch, EpochSpec, HostInfo, ModelInfo
from cluster.messages.views import Operation, Phase
from cluster.operations import OperationLog
from cluster.placement import Placement, WorkerId
from cluster.transfers import Transfers, plan_transfers

MAX_BACKOFF_S = 30.0
DEAD_REMEMBERED = 16


class Stage(StrEnum):
    TRANSFERRING = "transferring"
    DRAINING = "draining"
    """Everything is in its place; workers that leave may finish what they run."""
    PREPARING = "preparing"
    COMMITTING = "committing"


@dataclass(slots=True, kw_only=True)
class Change:
    """An attempt to make the next epoch."""

    operation_id: str
    kind: str
    spec: EpochSpec
    forms_group: bool
    transfers: Transfers
    stage: Stage
    stage_since: float
    urgent: bool
    """Nothing is served until it is done."""
    nbytes: int = 0

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        return tuple(worker.id for worker in self.spec.placement.workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSettings:
    workers: int
    redundant_experts: int = 0
    rebalance_interval_s: float = 60.0
    """0: only on request."""
    shared_gpus: bool = False
    """Workers share GPUs, which NCCL cannot do."""
    min_workers: int | None = None
    max_workers: int | None = None
    """The autoscaler's limits, which hold for whoever asks for a size. None: no autoscaler."""
    autoscale_window_s: float = 15.0
    seats_per_worker: int = 64
    """Requests that a worker runs at a time."""
    drain_timeout_s: float = 30.0
    """How long the requests of a worker that leaves may take; then they move."""
    expert_capacity: int | None = None
    """Experts that a worker has memory for, over all layers; None: as each reports."""
    cluster_id: str = "emoe"
    """Part of every process group's name, so that two clusters on one machine do not meet."""


class Epochs:
    def __init__(self, settings: ControlSettings, model: ModelInfo) -> None:
        self.settings = settings
        self.model = model
        self.members: dict[WorkerId, Member] = {}
        """In the order in which they were asked for, which is rank order. Some dead ones are remembered."""
        self.spec: EpochSpec | None = None
        """The current epoch; None before the first."""
        self.broken: str | None = None
        """Why the current epoch cannot serve; None while it can."""
        self.change: Change | None = None
        self.operations = OperationLog()
        self.counters = ClusterCounters()
        self.load: npt.NDArray[np.int64] = np.zeros((model.num_layers, model.num_logical_experts), dtype=np.int64)
        """[L, E] recent tokens per expert, set by the shell: where lost experts go."""
        self.epoch_since = 0.0
        self.retry_at = 0.0
        self._failures = 0
        self._next_epoch = 1
        self._next_group = 1
        self._broken_group: str | None = None
        self._broken_cause = ""
        self._broken_at: float | None = None
        """When service stopped; None while the current epoch serves."""
        self._read_all = False
        self._told_draining: tuple[WorkerId, ...] | None = ()
        """What the engine was told last; None where that is not known."""
        self._busy: tuple[WorkerId, ...] | None = None
        """Workers that run requests; None where nothing was heard since the engine was told to drain some."""
        self._out: list[Command] = []

    @property
    def epoch(self) -> Epoch:
        return self.spec.epoch if self.spec else Epoch(0)

    @property
    def ranks(self) -> tuple[WorkerId, ...]:
        """Members of the current epoch, in rank order; dead ones included until the next epoch."""
        return tuple(worker.id for worker in self.spec.placement.workers) if self.spec else ()

    @property
    def alive(self) -> list[Member]:
        return [member for member in self.members.values() if member.alive]

    def _is_current(self, epoch: Epoch, stage: Stage) -> bool:
        return self.change is not None and self.change.spec.epoch == epoch and self.change.stage is stage

    def _begin(self, operation: Operation, placement: Placement, now: float) -> None:
        """The next epoch will be `placement`'s workers and slots."""
        assert self.change is None
        transfers = plan_transfers(
            placement,
            has={worker.id: self.members[worker.id].has for worker in placement.workers},
            sources={member.id: member.held for member in self.alive if member.loaded},
            read_all=self._read_all,
        )
        self.change = Change(
            operation_id=operation.operation_id,
            kind=operation.kind,
            spec=self._next_spec(placement),
            forms_group=self._needs_group(placement),
            transfers=transfers,
            stage=Stage.TRANSFERRING,
            stage_since=now,
            urgent=self.spec is None or self.broken is not None,
        )
        epoch = self.change.spec.epoch
        self._next_epoch += 1
        self._next_group += self.change.forms_group
        self.operations.advance(operation.operation_id, phase=Phase.PREPARING, epoch=epoch)
        if transfers:
            urgent = self.change.urgent
            self._out.append(Transfer(epoch=epoch, copies=transfers.copies, reads=transfers.reads, urgent=urgent))
        else:
            self._drain(now)

    def _needs_group(self, placement: Placement) -> bool:
        return self.broken is not None or tuple(worker.id for worker in placement.workers) != self.ranks

    def _next_spec(self, placement: Placement) -> EpochSpec:
        number = Epoch(self._next_epoch)
        if self.spec is not None and not self._needs_group(placement):
            return replace(self.spec, epoch=number, placement=placement)
        infos = [self._info(worker.id) for worker in placement.workers]
        return EpochSpec(
            epoch=number,
            placement=placement,
            group=f"{self.settings.cluster_id}-{self._next_group}",
            transport=choose_transport(infos, shared_gpus=self.settings.shared_gpus),
            rendezvous="",
        )

    def _info(self, worker: WorkerId) -> HostInfo:
        info = self.members[worker].info
        assert info is not None, f"{worker} has not loaded"
        return info

    def _transfer_ended(self, event: TransferDone | TransferFailed, now: float) -> None:
        change = self.change
        if change is None or not self._is_current(event.epoch, Stage.TRANSFERRING):
            return
        change.nbytes += event.nbytes
        if isinstance(event, TransferFailed):
            for worker, layer, expert in event.staged:
                self.members[worker].staged[layer, expert] = True
            # the checkpoint is the truth: no second try with bytes from a host
            self._read_all = change.kind != "rebalance"
            self._give_up(event.reason, now)
            return
        for move in change.transfers.copies:
            self.members[move.target].staged[move.layer, move.expert] = True
        for worker, layer, expert in change.transfers.reads:
            self.members[worker].staged[layer, expert] = True
        self._drain(now)

    def _drain(self, now: float) -> None:
        """All experts are where they should be. Whoever leaves may finish its requests first, for a while."""
        assert self.change is not None
        if self._drained(self.change, now):
            self._prepare(now)
        elif self.change.stage is not Stage.DRAINING:
            self._enter(Stage.DRAINING, now)

    def _drained(self, change: Change, now: float) -> bool:
        if change.urgent or self.broken is not None:
            return True
        leaving = [self.members[worker] for worker in self.ranks if worker not in change.workers]
        return not any(
            (self._busy is None or member.id in self._busy)
            and now - member.draining_since < self.settings.drain_timeout_s
            for member in leaving
            if member.alive
        )

    def _tell_draining(self) -> None:
        """Have the engine spare those that are to leave, as long as there are others."""
        if self.spec is None or self.broken is not None:
            return
        leaving = tuple(worker for worker in self.ranks if self.members[worker].state is WorkerState.DRAINING)
        if len(leaving) == len(self.ranks):
            leaving = ()
        if leaving != self._told_draining:
            self._told_draining, self._busy = leaving, None
            self._out.append(Drain(workers=leaving))

    def _enter(self, stage: Stage, now: float) -> None:
        assert self.change is not None
        self._time_stage(self.change, now)
        self.change.stage, self.change.stage_since = stage, now

    def _time_stage(self, change: Change, now: float) -> None:
        if change.kind == "rebalance":
            self.counters.rebalance_s[change.stage].add(now - change.stage_since)

    def _prepare(self, now: float) -> None:
        assert self.change is not None
        self._enter(Stage.PREPARING, now)
        self._out.append(Prepare(spec=self.change.spec, forms_group=self.change.forms_group))

    def _prepared(self, event: Prepared, now: float) -> None:
        change = self.change
        if change is None or not self._is_current(event.spec.epoch, Stage.PREPARING):
            return
        change.spec = event.spec
        self._enter(Stage.COMMITTING, now)
        self.operations.advance(change.operation_id, phase=Phase.COMMITTING)
        self._out.append(Commit(spec=event.spec))

    def _committed(self, now: float, moved_requests: int = 0) -> None:
        change, self.change = self.change, None
        assert change is not None
        self.counters.requests_moved += moved_requests
        self._time_stage(change, now)
        if self._broken_at is not None:
            self.counters.recoveries[self._broken_cause] += 1
            self.counters.recovery_s.add(now - self._broken_at)
        self.spec = change.spec
        self.broken = self._broken_at = None
        self.epoch_since = now
        self.retry_at = 0.0
        self._read_all = False
        for worker in self.ranks:
            self._becomes_member(self.members[worker])
        for member in self.alive:
            if member.state is WorkerState.DRAINING and member.id not in self.ranks:
                self._stop(member)
        self.counters.experts_moved += len(change.transfers.copies) + len(change.transfers.reads)
        self.counters.bytes_moved += change.nbytes
        self._finish(change, now)
        # what failed while the flip was under way: the new epoch may be as broken as the old one
        dead = [worker for worker in self.ranks if not self.members[worker].alive]
        if dead:
            self._break(f"worker {dead[0]} was lost during the flip", "worker", now)
        elif self._broken_group == change.spec.group:
            self._break("a step failed during the flip", "step", now)
        self._forget_dead()

    def _becomes_member(self, member: Member) -> None:
        assert self.spec is not None
        if member.alive:
            member.held = needs(self.spec.placement, member.id)
            member.staged = np.zeros_like(member.held)
            if member.state is WorkerState.STARTING:
                member.state = WorkerState.SERVING

    def _finish(self, change: Change, now: float) -> None:
        """The change's epoch has begun: end its operation."""
        raise NotImplementedError

    def _commit_failed(self, reason: str, now: float, cause: str = "flip") -> None:
        """Some hosts may have flipped. Count only on what a host holds either way; the group is of no use."""
        assert self.change is not None
        for worker in self.change.workers:
            member = self.members[worker]
            member.held = member.held & needs(self.change.spec.placement, worker)
        if self.spec is not None:
            self._break(f"epoch {self.change.spec.epoch} could not begin: {reason}", cause, now)
        self._give_up(reason, now)

    def _give_up(self, reason: str, now: float, *, at_once: bool = False) -> None:
        """Roll the change back. A re-placement has then failed; anything else is tried again, from what is there.

        at_once: the cause is known and dealt with; there is no need to wait before the next attempt.
        """
        change, self.change = self.change, None
        assert change is not None
        # what was brought for a start or a recovery will be wanted by the next attempt too
        if change.kind == "rebalance" or change.stage in (Stage.PREPARING, Stage.COMMITTING):
            members = [self.members[worker] for worker in change.workers if self.members[worker].alive]
            self._out.append(Abandon(epoch=change.spec.epoch, workers=tuple(member.id for member in members)))
            for member in members:
                member.staged = np.zeros_like(member.staged)
        if change.kind == "rebalance":
            self.operations.fail(change.operation_id, reason)
            self.counters.rebalances["failed"] += 1
        else:
            self.operations.advance(change.operation_id, phase=Phase.PREPARING)
            self.operations.note_error(change.operation_id, reason)
        self._open_recovery()
        if not at_once:
            self._failures += 1
            self.retry_at = now + min(MAX_BACKOFF_S, 0.1 * 2.0 ** min(self._failures, 10))

    def _break(self, reason: str, cause: str, now: float) -> None:
        """The current epoch serves no more. Nothing but a new group will do. cause: one of CAUSES."""
        assert self.spec is not None
        self._broken_group = self.spec.group
        # an engine does this as well, unless it died too
        epochs = [self.spec.epoch]
        if self.change is not None and self.change.stage is Stage.COMMITTING:
            epochs.append(self.change.spec.epoch)
        workers = tuple(member.id for member in self.alive if member.loaded)
        self._out.append(AbortSteps(epochs=tuple(epochs), workers=workers))
        if self.broken is None:
            self.broken, self._broken_cause, self._broken_at = reason, cause, now
        elif (self._broken_cause, cause) == ("step", "worker"):
            # which is why the step failed
            self._broken_cause = cause
        self._open_recovery()

    def _open_recovery(self) -> None:
        # while a change is under way its outcome decides whether there is anything left to recover from
        if self.broken is not None and self.change is None and self.operations.find_open("recover") is None:
            self.operations.open("recover", Epoch(self._next_epoch), self.broken)

    def _stop(self, member: Member) -> None:
        member.state = WorkerState.DEAD
        member.held = np.zeros_like(member.held)
        member.staged = np.zeros_like(member.held)
        self._out.append(StopWorker(worker=member.id))

    def _forget_dead(self) -> None:
        in_use = {*self.ranks, *(self.change.workers if self.change else ())}
        dead = [member.id for member in self.members.values() if not member.alive and member.id not in in_use]
        for worker in dead[:-DEAD_REMEMBERED]:
            del self.members[worker]
