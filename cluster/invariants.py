"""What holds of a ControlState after every event, whatever the order of events. Tests check it each time."""

from __future__ import annotations

import numpy as np

from cluster.epochs import Stage
from cluster.membership import WorkerState, needs
from cluster.messages.views import Phase
from cluster.operations import ENDED, HISTORY
from cluster.state import ControlState


def validate(state: ControlState) -> None:
    """Raises AssertionError that names the invariant."""
    _check_epochs(state)
    _check_members(state)
    _check_experts(state)
    _check_operations(state)


def _check_epochs(state: ControlState) -> None:
    change = state.change
    assert change is None or change.spec.epoch > state.epoch, "a change makes a later epoch than the current one"
    if change is not None and not change.forms_group:
        assert state.spec is not None
        assert change.spec.group == state.spec.group, "an epoch without a new group keeps the one in force"
        assert change.workers == state.ranks, "a group serves one membership"
        assert state.broken is None or change.stage is Stage.COMMITTING, "a broken group is not used again"


def _check_members(state: ControlState) -> None:
    if state.spec is not None and state.broken is None:
        for worker in state.ranks:
            assert state.members[worker].alive, "an epoch that serves has only living members"
    if state.change is not None and state.change.stage is not Stage.COMMITTING:
        for worker in state.change.workers:
            assert state.members[worker].loaded, "an epoch is made of living, loaded workers"
    wanted = [m for m in state.alive if m.state is not WorkerState.DRAINING]
    assert len(wanted) <= state.target, "no more workers are started than asked for"
    settings = state.settings
    most = min(settings.max_workers or state.model.num_logical_experts, state.model.num_logical_experts)
    assert (settings.min_workers or 1) <= state.target <= most, "the wanted size stays within its limits"
    for member in state.members.values():
        if not member.alive:
            assert not member.has.any(), "nothing is counted on at a dead worker"


def _check_experts(state: ControlState) -> None:
    if state.spec is not None and state.broken is None:
        held = np.zeros_like(state.load, dtype=np.bool_)
        for worker in state.ranks:
            member = state.members[worker]
            held |= member.held
            needed = needs(state.spec.placement, worker)
            assert not (needed & ~member.held).any(), "a member of an epoch that serves holds what it is given"
            capacity = None if member.info is None else member.info.expert_capacity
            assert capacity is None or needed.sum() <= capacity, "no worker is given more than it has memory for"
        assert held.all(), "the last copy of an expert is never dropped"
    change = state.change
    if change is not None and change.stage is not Stage.TRANSFERRING:
        for worker in change.workers:
            member = state.members[worker]
            missing = needs(change.spec.placement, worker) & ~member.has
            assert not member.alive or not missing.any(), "no host prepares what it does not hold"


def _check_operations(state: ControlState) -> None:
    open_ones = [op for op in state.operations.all() if op.phase not in ENDED]
    assert len(state.operations.all()) <= HISTORY + len(open_ones), "the history is bounded"
    assert len({op.kind for op in open_ones}) == len(open_ones), "one operation of a kind at a time"
    committing = [op.operation_id for op in open_ones if op.phase is Phase.COMMITTING]
    running = state.change
    if running is not None:
        assert any(op.operation_id == running.operation_id for op in open_ones), "a change belongs to an open operation"
    expected = [running.operation_id] if running is not None and running.stage is Stage.COMMITTING else []
    assert committing == expected, "an operation commits when its change does"
    for operation in state.operations.all():
        progress, safe = state.told(operation)
        assert 0.0 <= progress <= 1.0, "progress is a share"
        for worker in operation.retiring if safe else ():
            member = state.members.get(worker)
            serves = state.broken is None and worker in state.ranks
            assert member is None or not (member.alive or member.has.any() or serves), "safe means out of use"
    if state.planning is not None:
        assert state.change is None, "no plan is made while the placement changes"
    if state.spec is not None and state.broken is not None and running is None:
        assert any(op.kind == "recover" for op in open_ones), "a recovery is on record"
