"""Scaling: how many workers there should be, because somebody asks for it or because the load does."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.autoscaling import Policy, Sample, recommend
from cluster.epochs import ControlSettings
from cluster.errors import ConflictError, PlacementError
from cluster.events import LoadSeen, ScaleRequested
from cluster.membership import Member, WorkerState, slots_of
from cluster.messages.epochs import Epoch, ModelInfo
from cluster.messages.views import Operation, ScaleView
from cluster.operations import ENDED
from cluster.placement import WorkerId
from cluster.rebalancing import Rebalancing


class Scaling(Rebalancing):
    """Re-placement, and the number of workers. Raises PlacementError for more workers than experts."""

    def __init__(self, settings: ControlSettings, model: ModelInfo) -> None:
        super().__init__(settings, model)
        self._check_target(settings.workers)
        self.target = settings.workers
        self._scaling: str | None = None
        """The operation that a wish for another size began."""
        self._samples: list[Sample] = []
        self._scaled_at = 0.0
        self.verdict = "the load has not been seen yet"
        """The autoscaler's last reason."""

    @property
    def _scaled(self) -> bool:
        """Whether those that serve are as many as asked for, and none of them is to leave."""
        leaving = any(self.members[worker].state is WorkerState.DRAINING for worker in self.ranks)
        return len(self.ranks) == self.target and not leaving

    @property
    def view(self) -> ScaleView:
        least, most = self._limits_of_target
        return ScaleView(
            serving=len(self.ranks) if self.broken is None else 0,
            target=self.target,
            min_workers=max(least, min(self.fewest, self.target)),
            max_workers=most,
            autoscaler=None if self.settings.max_workers is None else self.verdict,
        )

    @property
    def _limits_of_target(self) -> tuple[int, int]:
        settings, experts = self.settings, self.model.num_logical_experts
        return settings.min_workers or 1, min(settings.max_workers or experts, experts)

    def _check_target(self, workers: int) -> None:
        settings, experts = self.settings, self.model.num_logical_experts
        least, most = self._limits_of_target
        if not least <= workers <= most:
            why = "each needs an expert of the model's" if most == experts else "the limits of the autoscaler"
            raise PlacementError(f"workers: expected {least} to {most} ({why}), got {workers}")
        if settings.expert_capacity is not None:
            per_layer = settings.expert_capacity // self.model.num_layers
            if workers * per_layer < experts:
                fewest = str(-(-experts // per_layer)) if per_layer else "more than any number"
                raise PlacementError(
                    f"workers: expected at least {fewest}, got {workers}: a layer has {experts} experts, and"
                    f" expert_memory_bytes is room for {per_layer} of every layer"
                )

    # --- Memory -------------------------------------------------------------------------------------------------

    def _limits(self, members: Sequence[Member]) -> list[int]:
        """Experts per layer that each has memory for. One that has not loaded yet is taken to have what others have."""
        known = [
            m.info.expert_capacity for m in self.alive if m.info is not None and m.info.expert_capacity is not None
        ]
        usual = min(known, default=self.settings.expert_capacity)
        layers, limits = self.model.num_layers, []
        for member in members:
            capacity = member.info.expert_capacity if member.info is not None else usual
            limits.append(self.model.num_logical_experts if capacity is None else capacity // layers)
        return limits

    def _slots(self, members: Sequence[Member]) -> tuple[int, ...] | None:
        return slots_of(self._limits(members), self.model.num_logical_experts, self.settings.redundant_experts)

    def _fits(self, members: Sequence[Member]) -> bool:
        """Whether `members` have memory for every expert."""
        return self._slots(members) is not None

    @property
    def fewest(self) -> int:
        """The least number of today's workers that have memory for every expert."""
        experts, limits = self.model.num_logical_experts, sorted(self._limits(self.alive), reverse=True)
        return next((n for n in range(1, len(limits)) if slots_of(limits[:n], experts, 0)), max(1, len(limits)))

    def _check_memory(self, target: int, retire: Sequence[WorkerId]) -> None:
        """Raises PlacementError where those that would stay cannot hold every expert."""
        present = [m for m in self.alive if m.state is not WorkerState.DRAINING and m.id not in retire]
        staying = [*[m for m in present if m.loaded], *[m for m in present if not m.loaded]][:target]
        if target > len(staying) or self._fits(staying):
            return
        limits = ", ".join(f"{m.id} {limit}" for m, limit in zip(staying, self._limits(staying), strict=True))
        raise PlacementError(
            f"workers: expected at least {self.fewest}: a layer has {self.model.num_logical_experts} experts, and those"
            f" that would stay have memory for {limits}"
        )

    # --- Wishes -------------------------------------------------------------------------------------------------

    def _scale_requested(self, event: ScaleRequested, now: float) -> None:
        what = f"without {', '.join(event.retire)}" if event.retire else f"to {event.workers} workers"
        if event.retire and event.workers is not None:
            what = f"to {event.workers} workers, {what}"
        if event.operation_id is not None and self._is_repeated(event.operation_id, what):
            return
        self._require_idle()
        for worker in event.retire:
            if worker not in self.members or self.members[worker].state is not WorkerState.SERVING:
                raise PlacementError(f"retire: {worker!r} is no serving worker")
        target = event.workers if event.workers is not None else self.target - len(set(event.retire))
        self._check_target(target)
        self._check_memory(target, event.retire)
        self._replace_pending(allowed=event.replace)
        self._scale(target, event.retire, asked=what, reason=f"scale {what}", operation_id=event.operation_id, now=now)

    def _is_repeated(self, operation_id: str, asked: str) -> bool:
        """Whether this was asked for before. Raises ConflictError where the id stands for something else."""
        known = self.operations.get(operation_id)
        if known is not None and (known.kind, known.asked) != ("scale", asked):
            raise ConflictError(f"operation {operation_id} is another one: {known.kind} {known.asked}")
        return known is not None

    def _replace_pending(self, *, allowed: bool) -> None:
        pending = self.operations.find_open("scale")
        if pending is None:
            return
        if not allowed:
            raise ConflictError(f"operation {pending.operation_id} is under way; replace: true would take its place")
        # it waits for workers that may never come
        self.operations.fail(pending.operation_id, "replaced by another request")

    def _scale(
        self,
        target: int,
        retire: tuple[WorkerId, ...],
        *,
        asked: str,
        reason: str,
        operation_id: str | None,
        now: float,
    ) -> None:
        self.target = target
        self._scaled_at = now
        for worker in retire:
            self._drain_member(self.members[worker], now)
            self.members[worker].retired = True
        present = [member for member in self.alive if member.state is not WorkerState.DRAINING]
        leaving = self._drop_surplus(present, target, now)
        operation = self.operations.open(
            "scale",
            Epoch(self._next_epoch),
            reason,
            operation_id=operation_id,
            asked=asked,
            retiring=tuple(dict.fromkeys((*retire, *leaving))),
        )
        self._scaling = operation.operation_id
        if self._scaled:
            self.operations.complete(operation.operation_id, f"there are {target} workers already")

    def _drain_member(self, member: Member, now: float) -> None:
        member.state, member.draining_since = WorkerState.DRAINING, now

    def _drop_surplus(self, present: list[Member], target: int, now: float) -> list[WorkerId]:
        """Those that do not serve yet go first, then the newest."""
        leaving = [*[m for m in present if m.loaded], *[m for m in present if not m.loaded]][target:]
        for member in leaving:
            if member.id in self.ranks:
                self._drain_member(member, now)
            else:
                self._stop(member)
        return [member.id for member in leaving]

    # --- Load ---------------------------------------------------------------------------------------------------

    def _load_seen(self, event: LoadSeen, now: float) -> None:
        """The autoscaler's look, once for every report of the engine's."""
        settings = self.settings
        self._busy = event.busy
        if settings.max_workers is None:
            return
        if self.broken is not None or not self._scaled:
            # what is seen now tells nothing of the size that is wanted
            self._samples.clear()
            self.verdict = "waits until as many workers serve as are wanted"
            return
        seen = Sample(at_s=now, waiting=event.waiting, running=event.running, kv_usage=event.kv_usage)
        self._samples = [s for s in self._samples if now - s.at_s <= 2 * settings.autoscale_window_s] + [seen]
        if not self._idle or self.operations.find_open("scale") is not None:
            return
        policy = Policy(
            min_workers=max(settings.min_workers or 1, min(self.fewest, self.target)),
            max_workers=min(settings.max_workers, self.model.num_logical_experts),
            seats_per_worker=settings.seats_per_worker,
            window_s=settings.autoscale_window_s,
        )
        verdict = recommend(policy, self._samples, workers=self.target, now=now, changed_at=self._scaled_at)
        self.verdict = verdict.reason
        if verdict.target != self.target:
            what = f"to {verdict.target} workers"
            reason = f"autoscale from {self.target} {what}: {verdict.reason}"
            self._scale(verdict.target, (), asked=what, reason=reason, operation_id=None, now=now)
            self._samples.clear()

    # --- What is told -------------------------------------------------------------------------------------------

    def told(self, operation: Operation) -> tuple[float, bool]:
        """(progress, safe to terminate) of an operation, as things are."""
        gone = all(w not in self.members or not self.members[w].alive for w in operation.retiring)
        return self._progress(operation), bool(operation.retiring) and gone

    def _progress(self, operation: Operation) -> float:
        change = self.change
        if operation.phase in ENDED:
            return float(operation.error is None)
        if change is not None and change.operation_id == operation.operation_id:
            return {"transferring": 0.5, "draining": 0.7, "preparing": 0.8, "committing": 0.9}[change.stage]
        if operation.kind == "rebalance":
            return 0.0
        # workers load first
        return 0.5 * min(1.0, sum(member.loaded for member in self.alive) / self.target)
