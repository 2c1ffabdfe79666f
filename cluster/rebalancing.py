"""Re-placement: when a planner is asked, and what becomes of its answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.epochs import Change, ControlSettings, Epochs
from cluster.errors import ConflictError, NotReadyError, PlacementError
from cluster.events import PlaceRequested, PlanReady, RebalanceRequested, Solve
from cluster.membership import needs
from cluster.messages.epochs import Epoch, ModelInfo
from cluster.messages.views import Operation, Readiness
from cluster.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """A planner at work."""

    ticket: int
    operation_id: str
    since: float
    requested: bool
    forced: bool
    """A planner was asked for by name: what it says is done, whatever it is predicted to gain."""


class Rebalancing(Epochs):
    """Epochs, and the decision to make one for a better placement of the same workers."""

    def __init__(self, settings: ControlSettings, model: ModelInfo) -> None:
        super().__init__(settings, model)
        self.planning: Planning | None = None
        self.probing = False
        """Whether it is being found out who lives; until then no epoch is begun."""
        self._next_ticket = 1
        self._rebalance_at: float | None = None
        self._last_skipped: str | None = None
        self.pinned = False
        """Periodic re-placement leaves the placement alone."""
        self._pins: str | None = None
        """The operation whose end pins what it has made."""

    def readiness(self) -> Readiness:
        raise NotImplementedError

    def _look_at_placement(self, now: float) -> None:
        if self._rebalance_at is not None and now >= self._rebalance_at and self._idle and self.broken is None:
            self._rebalance_at = now + self.settings.rebalance_interval_s
            # a lone worker holds all experts wherever they are, and a planner's process takes two seconds of a core
            if self.load.any() and not self.pinned and len(self.ranks) > 1:
                self._start_planning(None, "periodic look at the placement", now, requested=False)

    @property
    def _idle(self) -> bool:
        return self.spec is not None and self.change is None and self.planning is None and not self.probing

    def _require_idle(self) -> None:
        if self.change is not None or self.planning is not None:
            running = self.change.operation_id if self.change else self.planning.operation_id if self.planning else ""
            raise ConflictError(f"operation {running} is under way")
        if self.spec is None or self.broken is not None or self.probing:
            raise NotReadyError(self.readiness().reason)

    def _rebalance_requested(self, event: RebalanceRequested, now: float) -> None:
        self._require_idle()
        self._start_planning(event.planner, f"requested, planner {event.planner}", now, requested=True)

    def _place_requested(self, event: PlaceRequested, now: float) -> None:
        self._require_idle()
        assert self.spec is not None
        placement = self._of_members(event.placement)
        if (short := self._too_much(placement)) is not None:
            raise PlacementError(f"placement: {short}")
        self.pinned = self.pinned and event.pinned is not False
        operation = self.operations.open("rebalance", Epoch(self._next_epoch), "requested, a given placement")
        if placement == self.spec.placement:
            self.pinned = self.pinned or event.pinned is True
            self.operations.complete(operation.operation_id, f"{operation.reason}: it is the current one already")
            self.counters.rebalances["skipped"] += 1
            return
        self._pins = operation.operation_id if event.pinned else None
        self._begin(operation, placement, now)

    def _of_members(self, placement: Placement) -> Placement:
        """`placement` on today's nodes. Raises PlacementError where it is not for these workers and this model."""
        assert self.spec is not None
        current = self.spec.placement
        for what, asked, there in (
            ("workers", _slots(placement), _slots(current)),
            ("num_logical_experts", placement.num_logical_experts, current.num_logical_experts),
            ("num_layers", placement.num_layers, current.num_layers),
        ):
            if asked != there:
                raise PlacementError(f"placement: {what} must be {there}, as those that serve, got {asked}")
        # a saved placement may be from before a restart, when nodes had other ids
        return replace(placement, workers=current.workers)

    @property
    def room(self) -> int | None:
        """Experts that any member could take beside what it holds; None where memory is not limited."""
        rooms = [
            member.info.expert_capacity - int(member.has.sum())
            for member in (self.members[worker] for worker in self.ranks)
            if member.info is not None and member.info.expert_capacity is not None
        ]
        return max(0, min(rooms)) if rooms else None

    def _too_much(self, placement: Placement) -> str | None:
        """Why a member could not hold what it has beside what `placement` brings, as it must until the flip."""
        for worker in placement.workers:
            member = self.members.get(worker.id)
            if member is None or member.info is None or member.info.expert_capacity is None:
                continue
            both = int((member.has | needs(placement, worker.id)).sum())
            if both > member.info.expert_capacity:
                return (
                    f"{worker.id} has memory for {member.info.expert_capacity} experts, and while they move it would"
                    f" hold {both}: move fewer at a time"
                )
        return None

    def _rebalanced(self, change: Change) -> None:
        if change.operation_id == self._pins:
            self.pinned, self._pins = True, None

    def _start_planning(self, planner: str | None, reason: str, now: float, *, requested: bool) -> None:
        operation = self.operations.open("rebalance", Epoch(self._next_epoch), reason)
        self.planning = Planning(
            ticket=self._next_ticket,
            operation_id=operation.operation_id,
            since=now,
            requested=requested,
            forced=requested and planner != "auto",
        )
        self._next_ticket += 1
        self._out.append(Solve(ticket=self.planning.ticket, planner=planner))

    def _plan_ready(self, event: PlanReady, now: float) -> None:
        planning = self.planning
        if planning is None or event.ticket != planning.ticket:
            return
        self.planning = None
        self.counters.rebalance_s["planning"].add(now - planning.since)
        assert self.spec is not None
        operation = self.operations.get(planning.operation_id)
        assert operation is not None
        short = None if event.placement is None else self._too_much(event.placement)
        if short or event.placement is None or tuple(w.id for w in event.placement.workers) != self.ranks:
            self.operations.fail(operation.operation_id, short or event.reason)
            self.counters.rebalances["failed"] += 1
        elif event.placement != self.spec.placement and (
            event.worthwhile or planning.forced or (planning.requested and event.no_worse)
        ):
            verdict = event.reason if event.worthwhile else f"done, although {event.reason}"
            self.operations.advance(operation.operation_id, reason=f"{operation.reason}: {verdict}")
            self._begin(operation, event.placement, now)
        else:
            self._skip(operation, event.reason, requested=planning.requested)

    def _skip(self, operation: Operation, reason: str, *, requested: bool) -> None:
        self.operations.complete(operation.operation_id, f"{operation.reason}: placement kept, {reason}")
        self.counters.rebalances["skipped"] += 1
        if not requested:
            # one line for a night of them, or they would push the history out
            if self._last_skipped is not None and self.operations.get(self._last_skipped):
                self.operations.forget(self._last_skipped)
            self._last_skipped = operation.operation_id

    def _cancel_planning(self, reason: str) -> None:
        if self.planning is not None:
            self.operations.fail(self.planning.operation_id, reason)
            self.counters.rebalances["failed"] += 1
            self.planning = None


def _slots(placement: Placement) -> str:
    return ", ".join(f"{worker.id} with {worker.slots} slots" for worker in placement.workers)
