"""Scaling: how many workers there should be, as asked for by a user or by the autoscaler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elastic_moe.cluster.decisions.autoscaling import Policy, Sample, Verdict, recommend
from elastic_moe.cluster.errors import ConflictError, PlacementError
from elastic_moe.cluster.facts.events import Command, LoadSeen, ScaleRequested
from elastic_moe.cluster.facts.facts import ControlSettings, Facts
from elastic_moe.cluster.facts.membership import Membership, WorkerRecord
from elastic_moe.cluster.facts.operations import OperationLog
from elastic_moe.cluster.lines import counted, present
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.messages.views import OperationKind, ScaleView, WorkerState
from elastic_moe.cluster.placement import WorkerId

_MOST_SHOWN = 8
"""Workers that a message names."""

# --- Decisions ----------------------------------------------------------------------------------------------------


def limits_of_target(settings: ControlSettings, model: ModelInfo) -> tuple[int, int]:
    """(fewest, most) workers that may be asked for, memory apart."""
    experts = model.num_logical_experts
    least = 1 if settings.min_workers is None else settings.min_workers
    return least, min(settings.max_workers or experts, experts)


def check_target(settings: ControlSettings, model: ModelInfo, workers: int) -> None:
    """Raises PlacementError, with what was expected, for an impossible number of workers."""
    experts = model.num_logical_experts
    least, most = limits_of_target(settings, model)
    if not least <= workers <= most:
        why = "each needs an expert of the model's" if most == experts else "the limits of the autoscaler"
        raise PlacementError(f"workers: expected {least} to {most} ({why}), got {workers}")
    if settings.expert_capacity is not None and settings.expert_capacity < model.num_layers:
        raise PlacementError(
            f"expert_memory_bytes: expected at least {model.num_layers * model.expert_bytes}, room for one expert of"
            f" each of the {model.num_layers} layers; it is room for {counted(settings.expert_capacity, 'expert')}"
        )


def check_memory(facts: Facts, target: int, retire: Sequence[WorkerId]) -> None:
    """Raises PlacementError if the workers that would stay, and those that would be started, which are taken to have as
    much memory, cannot hold every expert."""
    staying = _oldest_first([record for record in facts.staying if record.id not in retire])[:target]
    coming = target - len(staying)
    if not target or facts.fits(staying, coming):
        return
    experts = facts.model.num_logical_experts
    fewest = next((n for n in range(target, experts) if facts.fits(staying, n - len(staying))), experts)
    limits = [f"{m.id} {limit}" for m, limit in zip(staying, facts.limits(staying), strict=True)]
    raise PlacementError(
        f"workers: expected at least {fewest}: a layer has {experts} experts, and the"
        f" workers that would stay have memory for {', '.join(limits) or 'none'}"
        + (f"; {coming} would be started" if coming else "")
    )


def surplus(facts: Facts, target: int, retire: Sequence[WorkerId] = ()) -> list[WorkerRecord]:
    """The workers beyond `target`, apart from those in `retire`: first those that do not serve yet, then the newest."""
    return _oldest_first([record for record in facts.staying if record.id not in retire])[target:]


def _oldest_first(members: Sequence[WorkerRecord]) -> list[WorkerRecord]:
    """Loaded workers before those that still load; each group in the order in which they were started."""
    return [*[m for m in members if m.loaded], *[m for m in members if not m.loaded]]


def advise(facts: Facts, samples: Sequence[Sample], now: float, changed_at: float, idle_since: float = 0.0) -> Verdict:
    """The autoscaler's verdict for the present number of workers."""
    settings = facts.settings
    assert settings.max_workers is not None
    policy = Policy(
        min_workers=fewest_wanted(facts),
        max_workers=min(settings.max_workers, facts.model.num_logical_experts),
        may_rest=settings.min_workers == 0,
        seats_per_worker=seats_per_worker(facts),
        window_s=settings.autoscale_window_s,
    )
    return recommend(policy, samples, workers=facts.target, now=now, changed_at=changed_at, idle_since=idle_since)


def seats_per_worker(facts: Facts) -> int:
    """Requests that a worker runs at a time: as many as are allowed, and as it has memory for their states."""
    infos = [record.info for record in facts.staying if record.info is not None]
    rooms = [info.state_room.seats for info in infos if info.state_room is not None]
    return min([facts.settings.seats_per_worker, *rooms])


def fewest_wanted(facts: Facts) -> int:
    """Fewest workers by the autoscaler's limits and by memory, but not more than there should be now."""
    return max(facts.settings.min_workers or 1, min(facts.fewest, facts.target))


# --- The owner ----------------------------------------------------------------------------------------------------


class Scaling:
    """Owns the number of workers that there should be, the operation that set it, and the autoscaler's samples.

    Raises PlacementError for more workers than experts.
    """

    def __init__(
        self, settings: ControlSettings, model: ModelInfo, membership: Membership, operations: OperationLog
    ) -> None:
        check_target(settings, model, settings.workers)
        self._settings = settings
        self._model = model
        self._membership = membership
        self._operations = operations
        self.target = settings.workers
        self.operation_id: str | None = None
        """Id of the last operation that changed the number of workers."""
        self._samples: list[Sample] = []
        self._changed_at = 0.0
        self._busy_at = 0.0
        """When the engine last had a request."""
        self._awake = settings.workers
        """Number of workers before the last rest, which the next request starts again."""
        self.verdict = "the load has not been seen yet"
        """The reason of the autoscaler's last verdict."""

    @property
    def settings(self) -> ControlSettings:
        """Those in force."""
        return self._settings

    def view(self, facts: Facts) -> ScaleView:
        return ScaleView(
            serving=len(facts.ranks) if facts.outage is None else 0,
            target=self.target,
            min_workers=0 if self._settings.min_workers == 0 else fewest_wanted(facts),
            max_workers=limits_of_target(self._settings, self._model)[1],
            next_worker=self._membership.next_worker,
            autoscaler=None if self._settings.max_workers is None else self.verdict,
        )

    # --- Wishes -------------------------------------------------------------------------------------------------

    def is_repeated(self, event: ScaleRequested) -> bool:
        """Whether this request was made before. Raises ConflictError if its id belongs to another request."""
        known = None if event.operation_id is None else self._operations.get(event.operation_id)
        if known is not None and (known.kind, known.asked) != (OperationKind.SCALE, _in_words(event)):
            raise ConflictError(f"operation {event.operation_id} exists and is another one: {known.kind} {known.asked}")
        return known is not None

    def requested(self, facts: Facts, event: ScaleRequested, now: float) -> list[Command]:
        """Raises ConflictError or PlacementError before anything is changed."""
        for worker in event.retire:
            if worker not in facts.records or facts.records[worker].state is not WorkerState.SERVING:
                serving = [name for name, record in facts.records.items() if record.state is WorkerState.SERVING]
                shown = ", ".join(serving[:_MOST_SHOWN]) + (", ..." if len(serving) > _MOST_SHOWN else "")
                raise PlacementError(f"retire: expected names of serving workers ({shown}), got {worker!r}")
        target = event.workers if event.workers is not None else self.target - len(set(event.retire))
        check_target(self._settings, self._model, target)
        check_memory(facts, target, event.retire)
        self._replace_pending(allowed=event.replace)
        asked = _in_words(event)
        return self._scale(
            facts, target, event.retire, asked=asked, reason=f"scale {asked}", operation_id=event.operation_id, now=now
        )

    def check(self, facts: Facts, settings: ControlSettings) -> None:
        """Raises PlacementError if `settings` of a redeploy ask for a number of workers that is not possible."""
        target = self._target_of(settings)
        check_target(settings, self._model, target)
        if target != self.target:
            check_memory(facts, target, ())

    def configured(self, facts: Facts, settings: ControlSettings, now: float) -> list[Command]:
        """Take over the settings of a redeploy, which have been checked.

        A number of workers that a user or the autoscaler has chosen stays, within the new limits, unless the redeploy
        changes the setting. One that has too little memory for the model is refused by a failed operation.
        """
        target = self._target_of(settings)
        if not self._has_memory(facts, target):
            target = self._within(settings)
            if not self._has_memory(facts, target):
                # no number within the new limits would do: the limits in force stay
                limits = self._settings.min_workers, self._settings.max_workers
                settings, target = replace(settings, min_workers=limits[0], max_workers=limits[1]), self.target
        self._settings = settings
        self._samples.clear()
        if target == self.target:
            return []
        asked = f"to {counted(target, 'worker')}"
        self._replace_pending(allowed=True)
        return self._scale(facts, target, (), asked=asked, reason=f"redeployed {asked}", operation_id=None, now=now)

    def _target_of(self, settings: ControlSettings) -> int:
        return settings.workers if settings.workers != self._settings.workers else self._within(settings)

    def _within(self, settings: ControlSettings) -> int:
        """The present number of workers, or the nearest one within the limits of `settings`."""
        least, most = limits_of_target(settings, self._model)
        return min(max(self.target, least), most)

    def _has_memory(self, facts: Facts, target: int) -> bool:
        """Whether so many workers have memory for the model: some may have reported theirs since a redeploy was
        checked. If not, an operation that has failed says so."""
        try:
            if target != self.target:
                check_memory(facts, target, ())
        except PlacementError as error:
            asked = f"to {counted(target, 'worker')}"
            refused = self._operations.open(OperationKind.SCALE, facts.next_epoch, f"redeployed {asked}", asked=asked)
            self._operations.fail(refused.operation_id, str(error))
            return False
        return True

    def _replace_pending(self, *, allowed: bool) -> None:
        pending = self._operations.find_open(OperationKind.SCALE)
        if pending is None:
            return
        if not allowed:
            raise self._operations.conflict(pending.operation_id, "replace: true would take its place")
        # the pending operation waits for workers that may never start
        self._operations.fail(pending.operation_id, "replaced by another request")

    def _scale(
        self,
        facts: Facts,
        target: int,
        retire: tuple[WorkerId, ...],
        *,
        asked: str,
        reason: str,
        operation_id: str | None,
        now: float,
    ) -> list[Command]:
        self._awake = self.target or self._awake
        self.target, self._changed_at = target, now
        for worker in retire:
            self._membership.drain(worker, now, retired=True)
        leaving = surplus(facts, target, retire)
        commands: list[Command] = []
        for record in leaving:
            if record.id in facts.ranks:
                self._membership.drain(record.id, now)
            else:
                commands.append(self._membership.stop(record.id))
        operation = self._operations.open(
            OperationKind.SCALE,
            facts.next_epoch,
            reason,
            operation_id=operation_id,
            asked=asked,
            retiring=tuple(dict.fromkeys((*retire, *(record.id for record in leaving)))),
        )
        self.operation_id = operation.operation_id
        leaves = any(self._membership[worker].state is WorkerState.DRAINING for worker in facts.ranks)
        if len(facts.ranks) == target and not (leaves or facts.rests):
            self._operations.complete(operation.operation_id, present(target, "worker"))
        return commands

    # --- Load ---------------------------------------------------------------------------------------------------

    def load_seen(self, facts: Facts, event: LoadSeen, now: float) -> list[Command]:
        """Add the engine's report to the samples, and scale if the autoscaler's verdict is another number."""
        if event.waiting or event.running:
            self._busy_at = now
            if not self.target:
                return self.wake(facts, "there is a request", now)
        if self._settings.max_workers is None:
            return []
        if facts.outage is not None or not facts.scaled:
            # the load on the present workers says nothing about the wanted number
            self._samples.clear()
            self.verdict = "waits until as many workers serve as are wanted"
            return []
        seen = Sample(at_s=now, waiting=event.waiting, running=event.running, kv_usage=event.kv_usage)
        window_s = self._settings.autoscale_window_s
        self._samples = [s for s in self._samples if now - s.at_s <= 2 * window_s] + [seen]
        if not facts.interruptible or self._operations.find_open(OperationKind.SCALE) is not None:
            return []
        verdict = advise(facts, self._samples, now, self._changed_at, self._busy_at)
        self.verdict = verdict.reason
        if verdict.target == self.target:
            return []
        self._samples.clear()
        asked = f"to {counted(verdict.target, 'worker')}"
        reason = f"autoscale from {self.target} {asked}: {verdict.reason}"
        return self._scale(facts, verdict.target, (), asked=asked, reason=reason, operation_id=None, now=now)

    def wake(self, facts: Facts, why: str, now: float) -> list[Command]:
        """As many workers as before the rest are wanted again."""
        self._replace_pending(allowed=True)
        for worker in facts.ranks if facts.serves else ():
            if not facts.records[worker].retired:
                self._membership.keep(worker)
                self._operations.stays(worker)
        _, most = limits_of_target(self._settings, self._model)
        target = max(1, min(self._awake, most))
        asked = f"to {counted(target, 'worker')}"
        reason = f"back {asked}: {why}"
        return self._scale(facts, target, (), asked=asked, reason=reason, operation_id=None, now=now)

    def resume(self, now: float) -> None:
        """Set all times by the clock of a restarted coordinator."""
        self._changed_at = self._busy_at = now
        self._samples.clear()


def _in_words(event: ScaleRequested) -> str:
    if not event.retire:
        return f"to {counted(event.workers or 0, 'worker')}"
    without = f"without {', '.join(event.retire)}"
    return without if event.workers is None else f"to {counted(event.workers, 'worker')}, {without}"
