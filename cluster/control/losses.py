"""Workers that fail, or leave with their nodes, and what becomes of the epoch and of a change that counts on them."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_moe.cluster.control.draining import leavers, notice
from elastic_moe.cluster.control.owners import Owners
from elastic_moe.cluster.control.transitions import Transitions
from elastic_moe.cluster.decisions import joining
from elastic_moe.cluster.facts.events import (
    Command,
    NodesDrain,
    Probed,
    StepFailed,
    WorkerFailed,
    WorkerLoaded,
    WorkerLost,
)
from elastic_moe.cluster.facts.facts import Cause
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.views import OperationKind, WorkerState
from elastic_moe.cluster.placement import WorkerId

MAX_STRIKES = 3
"""Number of failed steps in a row after which their suspect is replaced although it answers pings."""


class Losses:
    """See the module."""

    def __init__(self, owners: Owners, transitions: Transitions) -> None:
        self._owners = owners
        self._transitions = transitions

    def worker_reported(self, event: WorkerLoaded | WorkerFailed | WorkerLost, now: float) -> list[Command]:
        if isinstance(event, WorkerLoaded):
            if self._owners.membership.loads(event.info, now):
                self._owners.starts.succeeded()
                self._check_memory()
            return []
        if isinstance(event, WorkerFailed) and event.fatal and self._owners.epochs.spec is None:
            self._give_in(event.reason)
        return self._lose(event.worker, event.reason, now)

    def _lose(self, worker: WorkerId, reason: str, now: float) -> list[Command]:
        """A worker is gone: give up the change that needs it. Upkeep then continues without the worker."""
        record = self._owners.membership.get(worker)
        if record is None or not record.alive:
            return []
        if not record.loaded:
            lasting = self._owners.starts.failed(worker, reason, now)
            if lasting is not None and self._owners.epochs.spec is None:
                self._give_in(lasting)
        commands: list[Command] = [self._owners.membership.stop(worker, lost=True)]
        if worker in self._owners.epochs.ranks:
            commands += self._owners.epochs.fail(f"worker {worker} lost: {reason}", Cause.WORKER, now)
            if self._owners.epochs.change is None:
                self._owners.rebalancing.interrupted(f"worker {worker} was lost", None, now)
        if self._owners.epochs.counts_on(worker):
            commands += self._transitions.give_up(f"worker {worker} lost: {reason}", now, at_once=True)
        self._owners.membership.forget_ended(self._owners.epochs.in_use)
        return commands

    def _check_memory(self) -> None:
        """Before the first epoch: give in if all workers have loaded and cannot serve every expert."""
        facts = self._owners.facts
        if facts.spec is None and len(facts.loaded) == facts.target and not facts.fits(facts.loaded):
            limits, experts = ", ".join(map(str, facts.limits(facts.loaded))), facts.model.num_logical_experts
            self._give_in(
                f"a layer has {experts} experts, and the workers, which cannot serve experts from disk, have memory for"
                f" {limits}: raise --workers or --expert-memory-bytes"
            )

    def _give_in(self, reason: str) -> None:
        """There will never be a first epoch."""
        if self._owners.starts.fatal is None:
            self._owners.starts.give_in(reason)
            self._owners.operations.fail_open(reason)

    def step_failed(self, event: StepFailed, now: float) -> list[Command]:
        if self._owners.epochs.spec is None or event.epoch != self._owners.epochs.spec.epoch:
            return []
        commands: list[Command] = [] if self._owners.membership.probing else [self._owners.membership.probe()]
        if self._owners.epochs.outage is None:
            commands += self._suspect(event.suspects, now)
        return commands + self._transitions.interrupt(f"a step failed: {event.reason}", Cause.STEP, now)

    def _suspect(self, suspects: Sequence[WorkerId], now: float) -> list[Command]:
        """Replace a worker that answers probes but is a suspect in several failed steps in a row."""
        commands: list[Command] = []
        for worker in suspects:
            strikes = self._owners.membership.strike(worker)
            if strikes >= MAX_STRIKES:
                commands += self._lose(worker, f"to blame for {strikes} failed steps", now)
        return commands

    def probed(self, event: Probed, now: float) -> list[Command]:
        """All workers were asked for a sign of life."""
        self._owners.membership.probed()
        return [command for worker, reason in event.lost for command in self._lose(worker, reason, now)]

    def could_not_join(self, reason: str, now: float) -> list[Command]:
        """The group of the change could not form. A worker that keeps failing to join others that serve is ended."""
        change = self._owners.epochs.change
        assert change is not None
        commands = self._transitions.give_up(reason, now)
        if not change.forms_group:
            return commands
        for worker in joining.blamed(self._owners.facts, change.workers):
            attempts = self._owners.membership.failed_to_join(worker)
            if attempts < joining.MAX_JOINS or not self._owners.facts.serves:
                continue
            why = f"{worker} could not join the others in {counted(attempts, 'attempt')}: {reason}"
            operation = self._owners.operations.find_open(OperationKind.SCALE)
            if operation is not None:
                self._owners.operations.fail(operation.operation_id, why)
            self._owners.starts.could_not_join(now)
            commands += self._lose(worker, why, now)
        return commands

    def nodes_drain(self, event: NodesDrain, now: float) -> list[Command]:
        """Retire the workers on nodes that leave. Others take their place where there is room for them."""
        facts = self._owners.facts
        found = leavers(facts, event.nodes)
        commands: list[Command] = []
        members = [leaver for leaver in found if leaver.worker in self._owners.epochs.in_use]
        for leaver in found:
            leave_by = None if leaver.left_s is None else now + leaver.left_s
            if leaver in members:
                self._owners.membership.drain(leaver.worker, now, retired=True, leave_by=leave_by)
            else:
                # it holds nothing that others need
                commands.append(self._owners.membership.stop(leaver.worker))
        fresh = tuple(m.worker for m in members if facts.records[m.worker].state is not WorkerState.DRAINING)
        if fresh:
            commands += self._transitions.make_haste(notice(members), now)
        if fresh and self._owners.operations.find_open(OperationKind.SCALE) is None:
            self._owners.operations.open(OperationKind.SCALE, facts.next_epoch, notice(members), retiring=fresh)
        return commands
