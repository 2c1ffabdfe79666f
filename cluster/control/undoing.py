"""Undoing: has re-placements that were carried out weighed, and goes back from those that have made steps longer."""

from __future__ import annotations

from elastic_moe.cluster.decisions.replacing import too_much, with_tiers
from elastic_moe.cluster.decisions.trials import Trials
from elastic_moe.cluster.facts.counters import ClusterCounters, RebalanceResult
from elastic_moe.cluster.facts.events import Command, Weigh, Weighed
from elastic_moe.cluster.facts.facts import Change, ControlSettings, Facts
from elastic_moe.cluster.facts.operations import OperationLog
from elastic_moe.cluster.messages.views import Operation, OperationKind
from elastic_moe.cluster.placement import Placement


class Undoing:
    """Owns the trials of re-placements. Where re-placement is only done on request, nothing is on trial."""

    def __init__(self, settings: ControlSettings, operations: OperationLog, counters: ClusterCounters) -> None:
        self._operations = operations
        self._counters = counters
        self._trials = Trials(settings.rebalance_interval_s)
        self._next_ticket = 1
        self._weighing: int | None = None
        """Ticket of the prices that were asked for."""

    @property
    def weighing(self) -> bool:
        """Whether prices are awaited, which take less than a second."""
        return self._weighing is not None

    def tick(self, facts: Facts, now: float) -> list[Command]:
        """Have the placements before the changes on trial priced, once a window is over."""
        if facts.pinned:
            self._clear()
        if self.weighing or not (facts.idle and facts.serves and self._trials.is_due(now)):
            return []
        self._weighing, self._next_ticket = self._next_ticket, self._next_ticket + 1
        return [Weigh(ticket=self._weighing, before=self._trials.placements)]

    def weighed(self, facts: Facts, event: Weighed, now: float) -> tuple[Operation, Placement] | None:
        """The prices have come. Returns the change to begin, if a re-placement is to be undone."""
        if event.ticket != self._weighing:
            return None
        self._weighing = None
        if not (facts.idle and facts.serves) or facts.pinned:
            # something else has begun meanwhile; they are asked for again
            return None
        undo = self._trials.weigh(event.present_s, event.before_s, event.tokens, now)
        if undo is None:
            return None
        operation = self._operations.open(OperationKind.REBALANCE, facts.next_epoch, undo.reason)
        if (short := too_much(facts, undo.placement)) is not None:
            self._operations.fail(operation.operation_id, short)
            self._counters.rebalances[RebalanceResult.FAILED] += 1
            return None
        self._counters.rebalances[RebalanceResult.UNDONE] += 1
        return operation, with_tiers(facts, undo.placement)

    def changed(self, change: Change, before: Placement | None, now: float, *, planned: bool) -> None:
        """A change from `before` has been made. `planned`: a planner made its placement."""
        self._weighing = None
        given = change.kind is OperationKind.REBALANCE and not planned
        if given or before is None or before.workers != change.goal.workers:
            self._clear()
        elif planned and self._trials.window_s > 0:
            self._trials.begin(change.operation_id, before, now)

    def configured(self, settings: ControlSettings) -> None:
        """Take over the settings of a redeploy."""
        self._trials.window_s = settings.rebalance_interval_s
        if settings.rebalance_interval_s <= 0:
            self._clear()

    def _clear(self) -> None:
        # prices that are awaited are of the trials that end here
        self._weighing = None
        self._trials.clear()

    def resume(self, now: float) -> None:
        """Go on by the clock of a restarted coordinator."""
        self._weighing = None
        self._trials.resume(now)
