"""How changes of the epoch begin and end, and what that means for the owners of other facts.

The change itself is carried out by its owner (cluster/control/change.py).
"""

from __future__ import annotations

from dataclasses import replace

from elastic_moe.cluster.control.draining import drained
from elastic_moe.cluster.control.owners import Owners
from elastic_moe.cluster.decisions import reconcile
from elastic_moe.cluster.facts.events import Command, TransferDone, TransferFailed
from elastic_moe.cluster.facts.facts import Cause, Change, Choice, Stage
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.views import Operation, OperationKind, Phase
from elastic_moe.cluster.placement import Placement


class Transitions:
    """See the module."""

    def __init__(self, owners: Owners) -> None:
        self._owners = owners
        self.drained = ""
        """Why the change under way goes on, or waits for those that leave."""

    # --- Forwards -----------------------------------------------------------------------------------------------

    def begin(self, change: tuple[Operation, Placement] | None, now: float) -> list[Command]:
        """Begin the change that ends in the given placement, at once or by a later promotion."""
        if change is None:
            return []
        operation, goal = change
        commands = self.give_way(operation.reason, now)
        # nothing is served meanwhile: what is lost is soon there, or is read from disk when it is needed
        budget_s = reconcile.READ_FIRST_S if self._owners.epochs.outage is not None else None
        return commands + self._owners.epochs.begin(
            operation, reconcile.step_to(self._owners.facts, goal, budget_s), now, goal=goal
        )

    def go_on(self, now: float) -> list[Command]:
        """Prepare the next epoch, once the workers that leave have finished or used up their time."""
        facts = self._owners.facts
        if facts.change is None or facts.change.stage is not Stage.DRAINING:
            return []
        choice = drained(facts, now)
        self.drained = choice.reason
        return self._owners.epochs.prepare(now) if choice.value else []

    def committed(self, now: float, moved_requests: int = 0) -> list[Command]:
        before = self._owners.epochs.goal
        change, commands = self._owners.epochs.flip(now, moved_requests)
        self._owners.undoing.changed(change, before, now, planned=self._owners.rebalancing.has_planned(change))
        self._owners.rebalancing.changed(change, now)
        if change.forms_group and len(change.workers) > 1:
            self._owners.starts.joined()
        self._end_operations(change)
        commands += self._owners.epochs.look_back(now)
        self._owners.membership.forget_ended(self._owners.epochs.in_use)
        return commands

    def _end_operations(self, change: Change) -> None:
        """End the operations that the new epoch completes."""
        facts, operations = self._owners.facts, self._owners.operations
        operation = operations.get(change.operation_id)
        assert operation is not None
        if operation.operation_id == self._owners.scaling.operation_id and not facts.scaled:
            # some workers are still to come
            operations.advance(operation.operation_id, phase=Phase.PREPARING)
        else:
            moved = f"{counted(len(change.transfers.copies), 'expert')} copied, {len(change.transfers.reads)} read"
            done = f"{operation.reason}; epoch {facts.epoch} with {counted(len(facts.ranks), 'worker')}, {moved}"
            operations.complete(operation.operation_id, done)

    # --- Back ---------------------------------------------------------------------------------------------------

    def transferred(self, event: TransferDone | TransferFailed, now: float) -> list[Command]:
        """The transfer of the change has ended."""
        taken_up = False
        if isinstance(event, TransferFailed) and self._owners.epochs.is_current(event.epoch, Stage.TRANSFERRING):
            again = self._interrupted(event.reason, now)
            event, taken_up = replace(event, reason=again.reason), again.value
        return self._owners.epochs.transferred(event, now, taken_up=taken_up)

    def commit_failed(self, reason: str, now: float, cause: Cause = Cause.FLIP) -> list[Command]:
        """Some workers may have begun the epoch."""
        again = self._interrupted(reason, now)
        return self._owners.epochs.commit_failed(again.reason, now, cause, taken_up=again.value)

    def give_up(self, reason: str, now: float, *, at_once: bool = False) -> list[Command]:
        """Roll the change back. It is tried again, unless it is a re-placement that nobody asked for, or a promotion.
        at_once: without a pause."""
        again = self._interrupted(reason, now)
        return self._owners.epochs.give_up(again.reason, now, at_once=at_once, taken_up=again.value)

    def _interrupted(self, reason: str, now: float) -> Choice[bool]:
        return self._owners.rebalancing.interrupted(reason, self._owners.epochs.change, now)

    def give_way(self, reason: str, now: float) -> list[Command]:
        """End a promotion for something else."""
        change = self._owners.epochs.change
        if change is None or not change.yields:
            return []
        return self._owners.epochs.give_up(f"it gave way: {reason}", now, at_once=True)

    def make_haste(self, reason: str, now: float) -> list[Command]:
        """End a re-placement: what it moves would keep a leaving node's experts waiting. One that a user has asked
        for is begun again when the workers of that node have left."""
        self._owners.rebalancing.put_off(reason)
        change = self._owners.epochs.change
        elective = change is not None and change.kind in (OperationKind.REBALANCE, OperationKind.PROMOTE)
        if change is None or not elective or change.stage is Stage.COMMITTING:
            return []
        return self.give_up(reason, now, at_once=True)

    def interrupt(self, reason: str, cause: Cause, now: float) -> list[Command]:
        """The epoch in force cannot serve: interrupt a planner, and give up every change that is not a recovery."""
        commands = self._owners.epochs.fail(reason, cause, now)
        change = self._owners.epochs.change
        if change is None:
            self._interrupted(reason, now)
        elif change.stage is not Stage.COMMITTING and change.kind is not OperationKind.RECOVER:
            commands += self.give_up(reason, now, at_once=True)
        return commands
