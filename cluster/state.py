"""ControlState: the decisions of the control plane. Events in, commands out; no Ray, no torch, no clock.

There is one mechanism. Whatever happens (start, re-placement, scaling, a death), the next epoch is made from the
workers that are there and a placement (cluster/epochs.py carries it out). `_reconcile`, after every event, compares
what is with what should be and begins such a change; only one runs at a time. Each attempt has an epoch number of its
own, never used again: answers that carry another are stale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cluster.epochs import MAX_BACKOFF_S, Change, ControlSettings, Stage
from cluster.events import (
    Command,
    CommitFailed,
    Committed,
    EngineLost,
    Event,
    LoadSeen,
    PlaceRequested,
    PlanReady,
    Prepared,
    PrepareFailed,
    Probe,
    Probed,
    RebalanceRequested,
    Resumed,
    ScaleRequested,
    StartWorker,
    StepFailed,
    Tick,
    TransferDone,
    TransferFailed,
    Unpin,
    WorkerFailed,
    WorkerLoaded,
    WorkerLost,
)
from cluster.membership import Member, WorkerState, adapt, expert_lists
from cluster.messages.epochs import Epoch, ModelInfo
from cluster.messages.views import Operation, Phase, Readiness
from cluster.operations import ENDED
from cluster.placement import Placement, Worker, WorkerId
from cluster.scaling import Scaling

JOIN_PATIENCE_S = 5.0
"""How long a loaded worker waits for others that are starting, so that they join in one epoch."""
RESTART_PATIENCE_S = 60.0
"""The same after all workers were lost, at most: others get as long again as the first one took."""
SURVIVORS_FIRST_S = 5.0
"""How long survivors get to serve again before others are started."""
STABLE_S = 30.0
"""An epoch that lives this long clears the suspicions against its workers."""
MAX_STRIKES = 3
MAX_START_FAILURES = 3
"""Before the first epoch, more workers than these dying while they load are a lasting error."""


class ControlState(Scaling):
    """See the module's docstring. Raises PlacementError for more workers than experts."""

    def __init__(self, settings: ControlSettings, model: ModelInfo) -> None:
        super().__init__(settings, model)
        self.fatal: str | None = None
        """Why waiting for the first epoch is in vain."""
        self._start_at = 0.0
        self._start_failures = 0
        self._next_worker = 0
        self.operations.open("start", Epoch(1), f"start with {self.target} workers")

    @property
    def whole(self) -> bool:
        """Whether everything is as it should be, and nothing under way."""
        return self._idle and self.broken is None and self._scaled

    @property
    def next_worker(self) -> WorkerId:
        return WorkerId(f"w{self._next_worker}")

    def readiness(self) -> Readiness:
        if self.fatal:
            return Readiness(ready=False, reason=self.fatal, error=self.fatal)
        if self.spec is not None and self.broken is None:
            return Readiness(ready=True, reason="serving")
        loaded = f"{sum(member.loaded for member in self.alive)} of {self.target} workers ready"
        reason = f"recovering, {loaded}: {self.broken}" if self.spec else f"starting, {loaded}"
        left = [member for member in self.alive if member.loaded]
        if self.spec is not None and left and not self._fits(left):
            room, experts = sum(self._limits(left)), self.model.num_logical_experts
            reason += f"; those left have memory for {room} of {experts} experts per layer: waiting for a replacement"
        if self.change is not None:
            reason += f"; {self.change.stage} for epoch {self.change.spec.epoch}"
        operation = self.operations.find_open("recover" if self.spec else "start")
        if operation is not None and operation.error:
            reason += f"; last attempt: {operation.error}"
        return Readiness(ready=False, reason=reason)

    # --- Events -------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; return what is to be done, in order.

        Raises ConflictError, NotReadyError or PlacementError for a request that is refused; nothing has changed then.
        """
        self._out = []
        match event:
            case Tick():
                self._tick(now)
            case WorkerLoaded():
                self._worker_loaded(event, now)
            case WorkerFailed():
                if event.fatal and self.spec is None:
                    self._give_in(event.reason)
                self._lose(event.worker, event.reason, now)
            case WorkerLost():
                self._lose(event.worker, event.reason, now)
            case TransferDone() | TransferFailed():
                self._transfer_ended(event, now)
            case Prepared():
                self._prepared(event, now)
            case PrepareFailed():
                if self._is_current(event.epoch, Stage.PREPARING):
                    self._give_up(event.reason, now)
            case Committed():
                if self._is_current(event.epoch, Stage.COMMITTING):
                    self._committed(now, event.moved_requests)
            case CommitFailed():
                if self._is_current(event.epoch, Stage.COMMITTING):
                    self._commit_failed(event.reason, now)
            case StepFailed():
                self._step_failed(event, now)
            case Probed():
                self.probing = False
                for worker, reason in event.lost:
                    self._lose(worker, reason, now)
            case EngineLost():
                self._engine_lost(event.reason, now)
            case Resumed():
                self._resumed(event, now)
            case PlanReady():
                self._plan_ready(event, now)
            case RebalanceRequested():
                self._rebalance_requested(event, now)
            case PlaceRequested():
                self._place_requested(event, now)
            case Unpin():
                self.pinned = False
            case ScaleRequested():
                self._scale_requested(event, now)
            case LoadSeen():
                self._load_seen(event, now)
        if self.change is not None and self.change.stage is Stage.DRAINING:
            self._drain(now)
        self._reconcile(now)
        self._tell_draining()
        return self._out

    def _tick(self, now: float) -> None:
        if self.spec is not None and self.broken is None and now - self.epoch_since >= STABLE_S:
            self._failures = 0
            for member in self.alive:
                member.strikes = 0
        self._look_at_placement(now)

    def _worker_loaded(self, event: WorkerLoaded, now: float) -> None:
        member = self.members.get(event.info.worker)
        if member is not None and member.alive and not member.loaded:
            member.info = event.info
            member.loaded_at = now
            member.held = member.told.copy()
            self._start_failures = 0

    def _lose(self, worker: WorkerId, reason: str, now: float) -> None:
        """A worker is gone: what counted on it is given up, and `_reconcile` goes on without."""
        member = self.members.get(worker)
        if member is None or not member.alive:
            return
        if not member.loaded:
            self._count_start_failure(member, reason, now)
        self._stop(member)
        if worker in self.ranks:
            self._break(f"worker {worker} lost: {reason}", "worker", now)
            self._cancel_planning(f"worker {worker} was lost")
        change = self.change
        # the outcome of a flip is the engine's to tell
        if change is not None and change.stage is not Stage.COMMITTING:
            is_source = any(move.source == worker for move in change.transfers.copies)
            if worker in (*change.workers, *self.ranks) or (is_source and change.stage is Stage.TRANSFERRING):
                self._give_up(f"worker {worker} lost: {reason}", now, at_once=True)
        self._forget_dead()

    def _count_start_failure(self, member: Member, reason: str, now: float) -> None:
        self._start_failures += 1
        self._start_at = now + min(MAX_BACKOFF_S, 0.25 * 2.0**self._start_failures)
        if self.spec is None and self._start_failures > MAX_START_FAILURES:
            self._give_in(f"worker {member.id} died while it loaded the model: {reason}")

    def _give_in(self, reason: str) -> None:
        """The first epoch will never be."""
        if self.fatal is None:
            self.fatal = reason
            for operation in self.operations.all():
                if operation.phase not in ENDED:
                    self.operations.fail(operation.operation_id, reason)

    def _step_failed(self, event: StepFailed, now: float) -> None:
        if self.spec is None or event.epoch != self.epoch:
            return
        if not self.probing:
            self.probing = True
            self._out.append(Probe(workers=tuple(member.id for member in self.alive if member.loaded)))
        if self.broken is None:
            self._suspect(event.suspects, now)
        self._interrupt(f"a step failed: {event.reason}", "step", now)

    def _suspect(self, suspects: Sequence[WorkerId], now: float) -> None:
        """A worker that answers probes, yet is to blame for one failed step after the other, is replaced."""
        for worker in suspects:
            member = self.members.get(worker)
            if member is not None and member.alive:
                member.strikes += 1
                if member.strikes >= MAX_STRIKES:
                    self._lose(worker, f"to blame for {member.strikes} failed steps", now)

    def _engine_lost(self, reason: str, now: float) -> None:
        self._told_draining, self._busy = (), None
        if self.change is not None and self.change.stage is Stage.COMMITTING:
            self._commit_failed(f"the engine is lost: {reason}", now, "engine")
        elif self.spec is not None:
            self._interrupt(f"the engine is lost: {reason}", "engine", now)

    def _interrupt(self, reason: str, cause: str, now: float) -> None:
        """The current epoch is of no use: whatever does not serve to leave it has to wait."""
        self._break(reason, cause, now)
        self._cancel_planning(reason)
        change = self.change
        if change is not None and change.stage is not Stage.COMMITTING and change.kind != "recover":
            self._give_up(reason, now, at_once=True)

    def _resumed(self, event: Resumed, now: float) -> None:
        """This state was saved, and its clock and every answer that was under way are gone."""
        self.counters.recoveries["coordinator"] += 1
        self._restart_clock(now)
        self._cancel_planning("the coordinator was restarted")
        self._told_draining = self._busy = None
        for member in self.alive:
            if not member.loaded:
                # its answer went to the coordinator before this one; a host that is asked again loads no second time
                member.asked_at = now
                self._out.append(StartWorker(worker=member.id, experts=expert_lists(member.told)))
        if self.change is not None and self.change.stage is not Stage.COMMITTING:
            self._give_up("the coordinator was restarted", now, at_once=True)
        elif self.change is not None and self.change.spec.epoch == event.engine_epoch:
            self._committed(now)
        elif self.change is not None:
            self._commit_failed("the coordinator was restarted", now)
        self.probing = True
        self._out.append(Probe(workers=tuple(member.id for member in self.alive if member.loaded)))

    def _restart_clock(self, now: float) -> None:
        self.epoch_since = self._scaled_at = now
        self._samples.clear()
        self._broken_at = None if self._broken_at is None else now
        if self.change is not None:
            self.change.stage_since = now
        self.retry_at = self._start_at = 0.0
        if self._rebalance_at is not None:
            self._rebalance_at = now + self.settings.rebalance_interval_s
        for member in self.alive:
            member.loaded_at = None if member.loaded_at is None else now
            member.draining_since = now

    # --- What should be -----------------------------------------------------------------------------------------

    def _reconcile(self, now: float) -> None:
        if self.fatal:
            return
        self._start_workers(now)
        if self.change is not None or self.probing or now < self.retry_at:
            return
        members = self._next_members(now)
        if not members or (self.broken is None and tuple(member.id for member in members) == self.ranks):
            return
        self._cancel_planning("the membership changes")
        self._begin(self._operation_for(members), self._placement_for(members), now)

    def _start_workers(self, now: float) -> None:
        present = [member for member in self.alive if member.state is not WorkerState.DRAINING]
        for member in self.alive:
            if len(present) < self.target and member.state is WorkerState.DRAINING and not member.retired:
                # it was to leave only because there were too many
                member.state = WorkerState.SERVING
                present.append(member)
        missing = self.target - len(present)
        if missing <= 0 or now < self._start_at or self._recover_alone(now):
            return
        for told in self._shares(len(present), missing):
            self._start_worker(told, now)

    def _recover_alone(self, now: float) -> bool:
        """Whether survivors are about to serve again: until then they need cores and disk more than a newcomer does."""
        survivors = [member for member in self.alive if member.id in self.ranks]
        since = now if self._broken_at is None else self._broken_at
        return self.broken is not None and now - since < SURVIVORS_FIRST_S and bool(survivors) and self._fits(survivors)

    def _shares(self, present: int, missing: int) -> list[npt.NDArray[np.bool_]]:
        """[L, E] for each of `missing` new workers, what it is to load: from the checkpoint, beside those that serve,
        rather than by copies that would take their time. First of all what nobody holds."""
        held = np.zeros(self.load.shape, dtype=np.bool_)
        for member in self.alive:
            held |= member.has if member.loaded else member.told
        shares = [np.zeros_like(held) for _ in range(missing)]
        for layer in range(self.model.num_layers):
            experts = np.lexsort((-self.load[layer], held[layer]))
            lost = experts[: int((~held[layer]).sum())]
            for part, share in enumerate(shares):
                share[layer, np.array_split(np.sort(lost), missing)[part]] = True
                # heavy and light ones, as many as an even share has
                room = self.model.num_logical_experts // (present + missing) - int(share[layer].sum())
                others = experts[len(lost) :][part :: present + missing]
                share[layer, others[: max(0, room)]] = True
        return shares

    def _start_worker(self, told: npt.NDArray[np.bool_], now: float) -> None:
        worker = self.next_worker
        self._next_worker += 1
        nothing = np.zeros_like(told)
        self.members[worker] = Member(
            id=worker,
            state=WorkerState.STARTING,
            told=told,
            held=nothing,
            staged=nothing.copy(),
            asked_at=now,
        )
        self._out.append(StartWorker(worker=worker, experts=expert_lists(told)))

    def _next_members(self, now: float) -> list[Member]:
        """Who should serve now; empty: wait."""
        loaded = [member for member in self.alive if member.loaded]
        # draining workers serve on only where nobody else can
        wanted = [member for member in loaded if member.state is not WorkerState.DRAINING]
        if not self._fits(wanted):
            wanted = loaded
        if not self._fits(wanted):
            return []
        current = [member for member in wanted if member.id in self.ranks]
        joining = [member for member in wanted if member.id not in self.ranks]
        if self.broken is not None and self._fits(current):
            return current
        first = min(joining, key=lambda member: member.loaded_at or now, default=None)
        loaded_at = now if first is None else first.loaded_at or now
        waited = now - loaded_at
        if len(wanted) < self.target:
            took = 0.0 if first is None else loaded_at - first.asked_at
            if not current and (self.spec is None or waited < min(took, RESTART_PATIENCE_S)):
                return []
            if current and self.broken is None and waited < JOIN_PATIENCE_S:
                return current
        return wanted

    def _operation_for(self, members: Sequence[Member]) -> Operation:
        kind = "start" if self.spec is None else "recover" if self.broken is not None else "scale"
        operation = self.operations.find_open(kind)
        if operation is not None:
            return operation
        joining = [member.id for member in members if member.id not in self.ranks]
        leaving = [worker for worker in self.ranks if worker not in {member.id for member in members}]
        words = [f"{' and '.join(ids)} {verb}" for ids, verb in ((joining, "to join"), (leaving, "to leave")) if ids]
        return self.operations.open(kind, Epoch(self._next_epoch), ", ".join(words) or "a new group")

    def _placement_for(self, members: Sequence[Member]) -> Placement:
        slots = self._slots(members)
        assert slots is not None, "members are chosen so that they hold every expert"
        workers = [Worker(id=m.id, node=self._info(m.id).node, slots=n) for m, n in zip(members, slots, strict=True)]
        return adapt(workers, {member.id: member.has for member in members}, self.load)

    def _finish(self, change: Change, now: float) -> None:
        if self.settings.rebalance_interval_s > 0:
            self._rebalance_at = now + self.settings.rebalance_interval_s
        operation = self.operations.get(change.operation_id)
        assert operation is not None
        moved = f"{len(change.transfers.copies)} experts copied, {len(change.transfers.reads)} read"
        if change.kind == "rebalance":
            self.counters.rebalances["completed"] += 1
            self._rebalanced(change)
        if operation.operation_id == self._scaling and not self._scaled:
            # some workers are still to come
            self.operations.advance(operation.operation_id, phase=Phase.PREPARING)
        else:
            done = f"{operation.reason}; epoch {self.epoch} with {len(self.ranks)} workers, {moved}"
            self.operations.complete(operation.operation_id, done)
        scaling = self.operations.find_open("scale")
        if scaling is not None and self._scaled:
            # a recovery has brought it about
            self.operations.complete(scaling.operation_id, f"{scaling.reason}; epoch {self.epoch}")
