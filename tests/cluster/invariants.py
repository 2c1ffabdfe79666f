"""What holds of a ControlState after every event, whatever the order of events. Tests check it each time."""

from __future__ import annotations

import numpy as np

from elastic_moe.cluster.control.state import ControlState
from elastic_moe.cluster.facts.facts import Facts, Stage
from elastic_moe.cluster.facts.membership import needs, serves
from elastic_moe.cluster.facts.operations import ENDED, HISTORY
from elastic_moe.cluster.facts.tiering import fits_in
from elastic_moe.cluster.messages.views import OperationKind, Phase


def validate(state: ControlState) -> None:
    """Raises AssertionError that names the invariant."""
    facts = state.facts
    _check_epochs(facts)
    _check_members(facts)
    _check_experts(facts)
    _check_operations(state, facts)


def _check_epochs(facts: Facts) -> None:
    change = facts.change
    assert change is None or change.spec.epoch > facts.epoch, "a change makes a later epoch than the current one"
    if change is not None and not change.forms_group:
        assert facts.spec is not None
        assert change.spec.group == facts.spec.group, "an epoch without a new group keeps the one in force"
        assert change.workers == facts.ranks, "a group serves one membership"
        assert facts.outage is None or change.stage is Stage.COMMITTING, "a broken group is not used again"


def _check_members(facts: Facts) -> None:
    if facts.serves:
        for worker in facts.ranks:
            assert facts.records[worker].alive, "an epoch that serves has only living members"
    if facts.change is not None and facts.change.stage is not Stage.COMMITTING:
        for worker in facts.change.workers:
            assert facts.records[worker].loaded, "an epoch is made of living, loaded workers"
    assert len(facts.staying) <= facts.target, "no more workers are started than asked for"
    settings = facts.settings
    most = min(settings.max_workers or facts.model.num_logical_experts, facts.model.num_logical_experts)
    least = 1 if settings.min_workers is None else settings.min_workers
    assert least <= facts.target <= most, "the wanted size stays within its limits"
    for member in facts.records.values():
        if not member.alive:
            assert not member.has.any(), "nothing is counted on at a dead worker"


def _check_experts(facts: Facts) -> None:
    if facts.spec is not None and facts.serves:
        held = np.zeros_like(facts.load, dtype=np.bool_)
        for worker in facts.ranks:
            member = facts.records[worker]
            served = serves(facts.spec.placement, worker)
            held |= member.held | (served & member.tiered)
            needed = needs(facts.spec.placement, worker)
            assert member.tiered or (needed == served).all(), "only a worker with a disk tier serves from disk"
            assert not (needed & ~member.held).any(), "a member of an epoch that serves holds what it is given"
            assert member.capacity is None or needed.sum() <= member.capacity, (
                "no worker is given more than it has memory for"
            )
        assert held.all(), "the last copy of an expert is never dropped, unless it is on disk"
        for worker, room in facts.rooms([facts.records[rank] for rank in facts.ranks]).items():
            assert room is None or fits_in(facts.spec.placement, worker, room), "pins leave room for a cache area"
            assert room is None or facts.goal is None or fits_in(facts.goal, worker, room), "a goal can be reached"
        assert facts.goal is not None, "an epoch has a goal"
        assert np.array_equal(facts.goal.physical_to_logical_map, facts.spec.placement.physical_to_logical_map), (
            "a goal differs in tiers alone"
        )
    change = facts.change
    if change is not None and change.stage is not Stage.TRANSFERRING:
        for worker in change.workers:
            member = facts.records[worker]
            missing = needs(change.spec.placement, worker) & ~member.has
            assert not member.alive or not missing.any(), "no worker prepares what it does not hold"


def _check_operations(state: ControlState, facts: Facts) -> None:
    open_ones = [op for op in state.operations.all() if op.phase not in ENDED]
    assert len(state.operations.all()) <= HISTORY + len(open_ones), "the history is bounded"
    assert len({op.kind for op in open_ones}) == len(open_ones), "one operation of a kind at a time"
    committing = [op.operation_id for op in open_ones if op.phase is Phase.COMMITTING]
    running = facts.change
    if running is not None:
        assert any(op.operation_id == running.operation_id for op in open_ones), "a change belongs to an open operation"
    expected = [running.operation_id] if running is not None and running.stage is Stage.COMMITTING else []
    assert committing == expected, "an operation commits when its change does"
    for operation in state.operations.all():
        progress, safe = state.progress(operation)
        assert 0.0 <= progress <= 1.0, "progress is a share"
        for worker in operation.retiring if safe else ():
            member = facts.records.get(worker)
            serves = facts.outage is None and worker in facts.ranks
            assert member is None or not (member.alive or member.has.any() or serves), "safe means out of use"
    if facts.planning is not None and not facts.planning.waits:
        assert facts.change is None, "no plan is made while the placement changes"
    if facts.spec is not None and facts.outage is not None and running is None and not facts.rests:
        assert any(op.kind is OperationKind.RECOVER for op in open_ones), "a recovery is on record"
