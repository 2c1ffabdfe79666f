"""Re-placement: when a planner is asked, and what becomes of its answer."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.facts.counters import ClusterCounters, RebalanceResult
from elastic_moe.cluster.facts.events import Command, PlaceRequested, PlanReady, RebalanceRequested, Solve
from elastic_moe.cluster.facts.facts import Change, Choice, ControlSettings, Facts, Planning, Stage
from elastic_moe.cluster.facts.membership import needs
from elastic_moe.cluster.facts.operations import OperationLog
from elastic_moe.cluster.facts.tiering import assign_tiers, fits_in
from elastic_moe.cluster.messages.views import Operation, OperationKind
from elastic_moe.cluster.placement import Placement, Tier

# --- Decisions ----------------------------------------------------------------------------------------------------


class Judgement(StrEnum):
    """Of a planner's answer."""

    ADOPTED = "adopted"
    KEPT = "kept"
    """The placement in force stays."""
    REFUSED = "refused"
    """It is no placement of those that serve."""


def worth_a_look(facts: Facts) -> Choice[bool]:
    """Whether to ask a planner for a better placement, where nobody has asked for one."""
    if not facts.load.any():
        return Choice(False, "nothing was counted yet")
    if facts.pinned:
        return Choice(False, "the placement is pinned")
    if len(facts.ranks) < 2:
        # and a planner's process takes two seconds of a core
        return Choice(False, "a lone worker holds all experts wherever they are")
    return Choice(True, "periodic look at the placement")


def judge(facts: Facts, planning: Planning, answer: PlanReady) -> Choice[Judgement]:
    """What to do with a planner's answer."""
    assert facts.spec is not None
    placement = answer.placement
    if placement is None:
        return Choice(Judgement.REFUSED, answer.reason)
    if (short := too_much(facts, placement)) is not None:
        return Choice(Judgement.REFUSED, short)
    if tuple(worker.id for worker in placement.workers) != facts.ranks:
        return Choice(Judgement.REFUSED, answer.reason)
    wanted = answer.worthwhile or planning.forced or (planning.requested and answer.no_worse)
    if with_tiers(facts, placement) == facts.goal or not wanted:
        return Choice(Judgement.KEPT, f"placement kept, {answer.reason}")
    return Choice(Judgement.ADOPTED, answer.reason if answer.worthwhile else f"done, although {answer.reason}")


def room(facts: Facts) -> int | None:
    """Experts that any member could take beside what it holds; None where memory does not limit that, as a member with
    a disk tier leaves there what does not fit until there is room."""
    members = [facts.records[worker] for worker in facts.ranks if not facts.records[worker].tiered]
    rooms = [record.capacity - int(record.has.sum()) for record in members if record.capacity is not None]
    return max(0, min(rooms)) if rooms else None


def too_much(facts: Facts, placement: Placement) -> str | None:
    """Why a member could not hold what it has beside what `placement` brings, as it must until the flip."""
    for worker in placement.workers:
        record = facts.records.get(worker.id)
        if record is None or record.capacity is None or record.tiered:
            continue
        both = int((record.has | needs(placement, worker.id)).sum())
        if both > record.capacity:
            return (
                f"{worker.id} has memory for {record.capacity} experts, and while they move it would hold {both}:"
                f" move fewer at a time"
            )
    return None


def with_tiers(facts: Facts, placement: Placement) -> Placement:
    """`placement` as it is if its tiers fit the members' devices, else with the heaviest experts in them."""
    members = [facts.records[worker] for worker in facts.ranks]
    rooms = facts.rooms(members)
    if all(room is None or fits_in(placement, worker, room) for worker, room in rooms.items()):
        return placement
    return assign_tiers(placement, rooms, {record.id: record.has for record in members}, facts.load)


def _crowded(facts: Facts, placement: Placement) -> str | None:
    """Why the tiers that `placement` gives do not fit; None where they do, or where it gives none."""
    if placement.all_resident:
        return None
    rooms = facts.rooms([facts.records[worker] for worker in facts.ranks])
    for worker, room in rooms.items():
        if room is not None and not fits_in(placement, worker, room):
            most = room.device - 1
            return f"the device of {worker} has room for {most} experts of each layer, besides a slot for the others"
        pinned = (placement.tiers == Tier.HOST) & (placement.slot_to_worker == placement.rank_of(worker))
        most = 0 if room is None else room.host
        if pinned.sum(axis=1).max(initial=0) > most:
            return f"{worker} has pinned memory for {most} experts of each layer"
    return None


def of_members(facts: Facts, placement: Placement) -> Placement:
    """`placement` on today's nodes, with tiers where it gives none and not everything fits. Raises PlacementError where
    it is not for these workers and this model."""
    assert facts.spec is not None
    current = facts.spec.placement
    for what, asked, there in (
        ("workers", _slots(placement), _slots(current)),
        ("num_logical_experts", placement.num_logical_experts, current.num_logical_experts),
        ("num_layers", placement.num_layers, current.num_layers),
    ):
        if asked != there:
            raise PlacementError(f"placement: {what} must be {there}, as those that serve, got {asked}")
    # a saved placement may be from before a restart, when nodes had other ids
    placement = replace(placement, workers=current.workers)
    if (short := too_much(facts, placement)) is not None:
        raise PlacementError(f"placement: {short}")
    if (short := _crowded(facts, placement)) is not None:
        raise PlacementError(f"placement: tiers: {short}")
    return with_tiers(facts, placement)


def _slots(placement: Placement) -> str:
    return ", ".join(f"{worker.id} with {worker.slots} slots" for worker in placement.workers)


# --- The owner ----------------------------------------------------------------------------------------------------


class Rebalancing:
    """Owns the planner at work, the pin, and the time of the next look."""

    def __init__(self, settings: ControlSettings, operations: OperationLog, counters: ClusterCounters) -> None:
        self._interval_s = settings.rebalance_interval_s
        self._operations = operations
        self._counters = counters
        self.planning: Planning | None = None
        self.pinned = False
        """Periodic re-placement leaves the placement alone."""
        self._pins: str | None = None
        """The operation whose end pins what it has made."""
        self._look_at: float | None = None
        """When to look at the placement; None before the first epoch, or where that is done only on request."""
        self._next_ticket = 1
        self._last_skipped: str | None = None

    def tick(self, facts: Facts, now: float) -> list[Command]:
        """The periodic look at the placement."""
        if self._look_at is None or now < self._look_at or not (facts.idle and facts.serves):
            return []
        self._look_at = now + self._interval_s
        look = worth_a_look(facts)
        return self._ask(facts, None, look.reason, now, requested=False) if look.value else []

    def requested(self, facts: Facts, event: RebalanceRequested, now: float) -> list[Command]:
        return self._ask(facts, event.planner, f"requested, planner {event.planner}", now, requested=True)

    def _ask(self, facts: Facts, planner: str | None, reason: str, now: float, *, requested: bool) -> list[Command]:
        operation = self._operations.open(OperationKind.REBALANCE, facts.next_epoch, reason)
        self.planning = Planning(
            ticket=self._next_ticket,
            operation_id=operation.operation_id,
            since=now,
            requested=requested,
            forced=requested and planner != "auto",
        )
        self._next_ticket += 1
        return [Solve(ticket=self.planning.ticket, planner=planner)]

    def answered(self, facts: Facts, event: PlanReady, now: float) -> tuple[Operation, Placement] | None:
        """A planner has answered. Returns the change to begin, if one is to be made of it."""
        planning = self.planning
        if planning is None or event.ticket != planning.ticket:
            return None
        self.planning = None
        self._counters.rebalance_s[Stage.PLANNING].add(now - planning.since)
        operation = self._operations.get(planning.operation_id)
        assert operation is not None
        choice = judge(facts, planning, event)
        reason = f"{operation.reason}: {choice.reason}"
        if choice.value is Judgement.REFUSED:
            self._fail(operation.operation_id, choice.reason)
        elif choice.value is Judgement.KEPT:
            self._skip(operation.operation_id, reason, requested=planning.requested)
        else:
            assert event.placement is not None
            self._operations.advance(operation.operation_id, reason=reason)
            return operation, with_tiers(facts, event.placement)
        return None

    def place(self, facts: Facts, event: PlaceRequested) -> tuple[Operation, Placement] | None:
        """To a given placement. Returns the change to begin, if there is anything to change.

        Raises PlacementError; nothing has changed then.
        """
        assert facts.spec is not None
        placement = of_members(facts, event.placement)
        self.pinned = self.pinned and event.pinned is not False
        operation = self._operations.open(OperationKind.REBALANCE, facts.next_epoch, "requested, a given placement")
        if placement != facts.goal:
            self._pins = operation.operation_id if event.pinned else None
            return operation, placement
        self.pinned = self.pinned or event.pinned is True
        self._operations.complete(operation.operation_id, f"{operation.reason}: it is the current one already")
        self._counters.rebalances[RebalanceResult.SKIPPED] += 1
        return None

    def unpin(self) -> None:
        self.pinned = False

    def changed(self, change: Change, now: float) -> None:
        """An epoch has begun."""
        if self._interval_s > 0:
            self._look_at = now + self._interval_s
        if change.kind is OperationKind.REBALANCE:
            self._counters.rebalances[RebalanceResult.COMPLETED] += 1
            if change.operation_id == self._pins:
                self.pinned, self._pins = True, None

    def cancel(self, reason: str) -> None:
        """Whatever a planner answers now is of no use."""
        if self.planning is not None:
            self._fail(self.planning.operation_id, reason)
            self.planning = None

    def resume(self, now: float) -> None:
        """Adapt to the clock of a restarted coordinator."""
        if self._look_at is not None:
            self._look_at = now + self._interval_s

    def _fail(self, operation_id: str, reason: str) -> None:
        self._operations.fail(operation_id, reason)
        self._counters.rebalances[RebalanceResult.FAILED] += 1

    def _skip(self, operation_id: str, reason: str, *, requested: bool) -> None:
        self._operations.complete(operation_id, reason)
        self._counters.rebalances[RebalanceResult.SKIPPED] += 1
        if not requested:
            # one line for a night of them, or they would push the history out
            if self._last_skipped is not None and self._operations.get(self._last_skipped):
                self._operations.forget(self._last_skipped)
            self._last_skipped = operation_id
