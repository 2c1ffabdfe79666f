"""Brings the cluster to what it should be, which functions of the facts say (cluster/decisions/reconcile.py)."""

from __future__ import annotations

from itertools import chain, repeat

from elastic_moe.cluster.control import draining
from elastic_moe.cluster.control.owners import Owners
from elastic_moe.cluster.control.transitions import Transitions
from elastic_moe.cluster.decisions import reconcile, spreading
from elastic_moe.cluster.facts.events import Command
from elastic_moe.cluster.messages.views import OperationKind


class Upkeep:
    """See the module. Keeps the reasons of its last decisions."""

    def __init__(self, owners: Owners, transitions: Transitions) -> None:
        self._owners = owners
        self._transitions = transitions
        self.starts = ""
        """Why workers are started, or none."""
        self.members = ""
        """Why an epoch is begun, or none."""
        self.promotion = ""
        """Why experts are brought into devices, or are not."""

    def reconcile(self, now: float) -> list[Command]:
        """Start workers and begin a change if the cluster is not as it should be."""
        if self._owners.starts.fatal:
            return []
        facts = self._owners.facts
        go = [worker for worker in facts.ranks if not facts.records[worker].alive or facts.records[worker].retired]
        for worker in reconcile.kept(facts):
            self._owners.membership.keep(worker)
            self._owners.operations.stays(worker, go)
        if draining.may_rest(self._owners.facts):
            return self._rest(now)
        nodes = self._spread(now)
        starts = reconcile.starts(self._owners.facts, now)
        commands: list[Command] = [
            self._owners.membership.start(assigned, now, node)
            for assigned, node in zip(starts.value, chain(nodes, repeat(None)), strict=False)
        ]
        facts = self._owners.facts
        members = reconcile.next_members(facts, now)
        self.starts, self.members = starts.reason, members.reason
        if not members.value:
            self._end_scaling()
            return commands
        self._owners.rebalancing.put_off("the membership changes")
        wish = reconcile.wish(facts, members.value)
        operation = self._owners.operations.find_open(wish.value)
        if operation is None:
            operation = self._owners.operations.open(wish.value, facts.next_epoch, wish.reason)
        commands += self._transitions.begin((operation, reconcile.placement_for(facts, members.value)), now)
        return commands + self._transitions.go_on(now)

    def _end_scaling(self) -> None:
        """End an operation that has got the workers it wanted by something else: a recovery, or those that were to
        leave and are kept."""
        facts, operations = self._owners.facts, self._owners.operations
        scaling = operations.find_open(OperationKind.SCALE)
        if scaling is not None and facts.serves and facts.scaled and (facts.change is None or facts.change.yields):
            operations.complete(scaling.operation_id, f"{scaling.reason}; epoch {facts.epoch}")

    def _spread(self, now: float) -> list[str]:
        """Have workers move to nodes that have come: those from which they move leave once others have loaded in their
        place. Returns the nodes for the workers to start now."""
        owners = self._owners
        owners.homes.use(record.info.node for record in owners.membership.alive if record.info is not None)
        for worker in spreading.stranded(owners.facts):
            owners.membership.stay(worker)
        for worker in spreading.replaced(owners.facts):
            owners.membership.drain(worker, now, retired=True)
        moves = spreading.relocations(owners.facts, owners.homes.fresh(now), now).value
        for move in moves:
            owners.membership.move(move.worker)
        nodes = [move.node for move in moves]
        owners.homes.use(nodes)
        return nodes

    def _rest(self, now: float) -> list[Command]:
        """Keep no worker, since there are no requests."""
        self._owners.rebalancing.cancel("there are no requests")
        commands: list[Command] = [self._owners.membership.stop(record.id) for record in self._owners.membership.alive]
        self._owners.epochs.rest(now)
        for kind in (OperationKind.SCALE, OperationKind.RECOVER):
            ended = self._owners.operations.find_open(kind)
            if ended is not None:
                self._owners.operations.complete(ended.operation_id, f"{ended.reason}; no worker is kept")
        return commands

    def promote(self, now: float) -> list[Command]:
        """Bring experts that are served from disk into devices, beside the serving."""
        if self._owners.starts.fatal:
            return []
        choice = reconcile.promotion(self._owners.facts, now)
        self.promotion = choice.reason
        if choice.value is None:
            return []
        operation = self._owners.operations.open(OperationKind.PROMOTE, self._owners.epochs.next_epoch, choice.reason)
        commands = self._owners.epochs.begin(operation, choice.value, now, goal=self._owners.epochs.goal)
        return commands + self._transitions.go_on(now)
