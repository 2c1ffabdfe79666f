"""Re-placement: asks a planner, and carries out its plan or a placement that was given.

What is asked and carried out is decided in cluster/decisions/replacing.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from elastic_moe.cluster.decisions.replacing import Judgement, judge, of_members, with_tiers, worth_a_look
from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.facts.counters import ClusterCounters, RebalanceResult
from elastic_moe.cluster.facts.events import (
    Command,
    PlaceRequested,
    PlanReady,
    RebalanceRequested,
    Solve,
    SubjectChanged,
)
from elastic_moe.cluster.facts.facts import Change, Choice, ControlSettings, Facts, Planning, Stage
from elastic_moe.cluster.facts.operations import OperationLog
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.views import Operation, OperationKind, WorkerState
from elastic_moe.cluster.placement import Placement

RELIEF = "relief"
"""The planner that answers a change of subject: a few moves, found at once."""

SETTLING_S = (10.0, 20.0, 40.0)
"""Seconds from a change of subject to looks at the whole placement, besides the periodic ones. Each window has counted
twice as much of the new subject as the one before, and a look moves only a part of the experts."""
COUNTS_PATIENCE_S = 10.0
"""Seconds that a planner which is asked again waits for routing counts: a restarted coordinator has none at first."""
MAX_AGAIN = 3
"""How often a re-placement that was asked for is begun again after a failure or a death: it may be their cause."""


def _requested(planner: str) -> str:
    return f"requested, planner {planner}"


@dataclass(frozen=True, slots=True)
class Asked:
    """A re-placement that a user asked for."""

    operation_id: str
    event: RebalanceRequested | PlaceRequested
    placement: Placement | None = None
    """The placement that was given, or the plan that was adopted; None before."""
    again: int = 0
    """How often it had to be begun again."""


class Rebalancing:
    """Owns the planner at work or the re-placement that waits, the pin, and the time of the next periodic look."""

    def __init__(self, settings: ControlSettings, operations: OperationLog, counters: ClusterCounters) -> None:
        self._interval_s = settings.rebalance_interval_s
        self._operations = operations
        self._counters = counters
        self.planning: Planning | None = None
        self.pinned = False
        """Whether periodic re-placement must not change the placement."""
        self.pins: str | None = None
        """Id of the operation that pins the placement when it completes."""
        self._asked: Asked | None = None
        """The last re-placement that a user asked for."""
        self._adopted: str | None = None
        """Id of the operation that carries out the last plan that was adopted."""
        self._look_at: float | None = None
        """Time of the next periodic look; None before the first epoch, and if re-placement is only done on request."""
        self._settling: tuple[float, ...] = ()
        """Times of the looks at the whole placement that a change of subject asks for besides."""
        self._next_ticket = 1
        self._last_skipped: str | None = None

    def tick(self, facts: Facts, now: float) -> list[Command]:
        """The periodic look at the placement."""
        due = tuple(at for at in self._settling if at <= now)
        if self._look_at is None or not (facts.idle and facts.serves) or not (due or self._look_at <= now):
            return []
        self._look_at = now + self._interval_s
        self._settling = self._settling[len(due) :]
        look = worth_a_look(facts)
        if not look.value:
            return []
        reason = "a look soon after a change of subject" if due else look.reason
        return self._ask(facts, None, reason, now, requested=False, settling=bool(due))

    def subject_changed(self, facts: Facts, event: SubjectChanged, now: float) -> list[Command]:
        """Ask for the few moves that help most, and look at the whole placement soon. Where re-placement is only done
        on request, nothing is asked for; where something else is under way, only the looks come."""
        if self._look_at is None:
            return []
        self._settling = tuple(now + after_s for after_s in SETTLING_S)
        if not (facts.idle and facts.serves and worth_a_look(facts).value):
            return []
        reason = "the first subject is known" if event.first else "the subject of the traffic has changed"
        return self._ask(facts, RELIEF, reason, now, requested=False)

    def requested(self, facts: Facts, event: RebalanceRequested, now: float) -> list[Command]:
        commands = self._ask(facts, event.planner, _requested(event.planner), now, requested=True)
        assert self.planning is not None
        self._asked = Asked(self.planning.operation_id, event)
        return commands

    def _ask(
        self, facts: Facts, planner: str | None, reason: str, now: float, *, requested: bool, settling: bool = False
    ) -> list[Command]:
        operation = self._operations.open(
            OperationKind.REBALANCE, facts.next_epoch, reason, asked=f"planner {planner}" if requested else ""
        )
        self.planning = self._planning(operation.operation_id, planner, now, requested=requested)
        return [Solve(ticket=self.planning.ticket, planner=planner, settling=settling)]

    def _planning(self, operation_id: str, planner: str | None, now: float, *, requested: bool) -> Planning:
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        forced = requested and planner != "auto"
        return Planning(ticket=ticket, operation_id=operation_id, since=now, requested=requested, forced=forced)

    def answered(self, facts: Facts, event: PlanReady, now: float) -> tuple[Operation, Placement] | None:
        """A planner has answered. Returns the change to begin, if its plan is adopted."""
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
            self._adopted = operation.operation_id
            placement = with_tiers(facts, event.placement)
            if self._asked is not None and self._asked.operation_id == operation.operation_id:
                # a coordinator that is restarted has lost the counts that it was planned for
                self._asked = replace(self._asked, placement=placement)
            return operation, placement
        return None

    def place(self, facts: Facts, event: PlaceRequested) -> tuple[Operation, Placement] | None:
        """Change to a given placement. Returns the change to begin; None if the placement is in force already.

        Raises PlacementError before anything is changed.
        """
        assert facts.spec is not None
        placement = of_members(facts, event.placement)
        self.pinned = self.pinned and event.pinned is not False
        operation = self._operations.open(
            OperationKind.REBALANCE, facts.next_epoch, "requested, a given placement", asked="a given placement"
        )
        if placement != facts.goal:
            self.pins = operation.operation_id if event.pinned else None
            self._asked = Asked(operation.operation_id, event, event.placement)
            return operation, placement
        self.pinned = self.pinned or event.pinned is True
        self._operations.complete(operation.operation_id, f"{operation.reason}: it is the current one already")
        self._counters.rebalances[RebalanceResult.SKIPPED] += 1
        return None

    def unpin(self) -> None:
        """Also what would pin the placement at its end: it goes on, and pins nothing."""
        self.pinned, self.pins = False, None

    def configured(self, settings: ControlSettings, now: float) -> None:
        """Take over the settings of a redeploy."""
        if settings.rebalance_interval_s != self._interval_s:
            self._interval_s = settings.rebalance_interval_s
            self._look_at = now + self._interval_s if self._interval_s > 0 else None

    def has_planned(self, change: Change) -> bool:
        """Whether a planner made the placement of the change."""
        return change.operation_id == self._adopted

    def changed(self, change: Change, now: float) -> None:
        """A change has been made: its epoch has begun."""
        if self._interval_s > 0:
            self._look_at = now + self._interval_s
        if change.kind is OperationKind.REBALANCE:
            self._counters.rebalances[RebalanceResult.COMPLETED] += 1
            if change.operation_id == self.pins:
                self.pinned, self.pins = True, None

    # --- What is begun again ----------------------------------------------------------------------------------------

    def put_off(self, reason: str) -> None:
        """The members change. A planner that a user asked for is asked again after that, since its answer would be for
        the members that there were. One that nobody asked for has failed."""
        planning, asked = self.planning, self._asked
        if planning is None or planning.waits:
            return
        if asked is None or asked.operation_id != planning.operation_id:
            self.cancel(reason)
        else:
            self._wait(asked, planning.since)

    def interrupted(self, why: str, change: Change | None, now: float) -> Choice[bool]:
        """The planner at work, or the change under way, cannot go on. Returns whether the change is of a re-placement
        that a user asked for, which waits now to be taken up, and why. Other looks come again by themselves."""
        under_way = change if self.planning is None else self.planning
        if under_way is None or (self.planning is not None and self.planning.waits):
            return Choice(False, why)
        asked = self._asked
        if asked is None or asked.operation_id != under_way.operation_id:
            self.cancel(why)
            return Choice(False, why)
        if asked.again == MAX_AGAIN:
            why = f"{why}; before, it was begun again {counted(MAX_AGAIN, 'time')}"
            self.cancel(why)
            return Choice(False, why)
        self._asked = replace(asked, again=asked.again + 1)
        self._operations.note_error(asked.operation_id, why)
        self._wait(asked, now)
        return Choice(under_way is change, why)

    def _wait(self, asked: Asked, now: float) -> None:
        # a new ticket: a late answer to the old one is ignored
        planner = asked.event.planner if isinstance(asked.event, RebalanceRequested) else None
        self.planning = replace(self._planning(asked.operation_id, planner, now, requested=True), waits=True)

    def cancel(self, reason: str) -> None:
        """Fail the operation of the planner at work, or of what waits. A late answer will be ignored."""
        if self.planning is not None:
            self._fail(self.planning.operation_id, reason)
        self.planning = None

    def resume(self, now: float) -> None:
        """Set all times by the clock of a restarted coordinator."""
        self._settling = ()
        if self._look_at is not None:
            self._look_at = now + self._interval_s
        if self.planning is not None and self.planning.waits:
            self.planning = replace(self.planning, since=now)

    def take_up(self, facts: Facts, now: float) -> tuple[list[Command], tuple[Operation, Placement] | None]:
        """Begin again what waits, once the cluster serves. Returns what to do, and the change to begin."""
        planning, asked = self.planning, self._asked
        if planning is None or not planning.waits:
            return [], None
        leaves = any(facts.records[worker].state is WorkerState.DRAINING for worker in facts.ranks)
        if leaves or facts.probing or not facts.serves or facts.change is not None or now < facts.retry_at:
            return [], None
        assert asked is not None
        operation = self._operations.get(planning.operation_id)
        assert operation is not None
        if asked.placement is not None:
            try:
                placement = of_members(facts, asked.placement)
            except PlacementError as error:
                if isinstance(asked.event, PlaceRequested):
                    self.cancel(str(error))
                    return [], None
                # the plan was for other members
            else:
                self.planning = None
                return [], (operation, placement)
        assert isinstance(asked.event, RebalanceRequested)
        if not facts.load.any() and now - planning.since < COUNTS_PATIENCE_S:
            return [], None
        self._asked = replace(asked, placement=None)
        self.planning = replace(planning, waits=False, since=now)
        # without what was said of an earlier plan
        self._operations.advance(operation.operation_id, reason=_requested(asked.event.planner))
        return [Solve(ticket=planning.ticket, planner=asked.event.planner)], None

    def _fail(self, operation_id: str, reason: str) -> None:
        self._operations.fail(operation_id, reason)
        self._counters.rebalances[RebalanceResult.FAILED] += 1

    def _skip(self, operation_id: str, reason: str, *, requested: bool) -> None:
        self._operations.complete(operation_id, reason)
        self._counters.rebalances[RebalanceResult.SKIPPED] += 1
        if not requested:
            # of skipped plans in a row only the last is kept, or a night of them would fill the history
            if self._last_skipped is not None and self._operations.get(self._last_skipped):
                self._operations.forget(self._last_skipped)
            self._last_skipped = operation_id
