"""What the control plane says of itself: whether it serves, and how far an operation is. Functions of the facts."""

from __future__ import annotations

from typing import NamedTuple

from elastic_moe.cluster.facts.facts import Facts, Stage
from elastic_moe.cluster.facts.operations import ENDED
from elastic_moe.cluster.facts.tiering import expected_stall_s
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.views import Operation, OperationKind, Readiness
from elastic_moe.cluster.placement import Tier

SHARES = {Stage.TRANSFERRING: 0.5, Stage.DRAINING: 0.7, Stage.PREPARING: 0.8, Stage.COMMITTING: 0.9}
"""Progress of an operation whose change is at a stage. Until there is a change, workers load."""


class Progress(NamedTuple):
    share: float
    """0..1"""
    safe_to_terminate: bool
    """Whether every worker that leaves by the operation is out of use."""


def readiness(facts: Facts, operation: Operation | None) -> Readiness:
    """operation: the start or recovery that is under way, if any."""
    if facts.fatal:
        return Readiness(ready=False, reason=facts.fatal, error=facts.fatal)
    if facts.serves:
        return serving(facts)
    if facts.rests and not facts.target:
        return Readiness(
            ready=True, reason="at rest: no worker is kept, and the next request waits until one has started"
        )
    loaded = f"{len(facts.loaded)} of {counted(facts.target, 'worker')} ready"
    if facts.outage is None or facts.rests:
        reason = f"starting, {loaded}"
    else:
        reason = f"recovering, {loaded}: {facts.outage.reason}"
    if facts.spec is not None and facts.loaded and not facts.fits(facts.loaded):
        memory, experts = sum(facts.limits(facts.loaded)), facts.model.num_logical_experts
        reason += f"; those left have memory for {memory} of {experts} experts per layer: waiting for a replacement"
    if facts.change is not None:
        reason += f"; {facts.change.stage} for epoch {facts.change.spec.epoch}"
    if operation is not None and operation.error:
        reason += f"; last attempt: {operation.error}"
    return Readiness(ready=False, reason=reason)


def serving(facts: Facts) -> Readiness:
    """While the epoch in force serves."""
    assert facts.spec is not None
    share = facts.spec.placement.resident_share
    if share == 1.0:
        return Readiness(ready=True, reason="serving")
    assert facts.goal is not None
    # rounded down, so that 100 % is all of them
    rooms = facts.rooms([facts.records[worker] for worker in facts.ranks])
    stall_s = expected_stall_s(facts.spec.placement, rooms, facts.model, facts.load, tokens=1)
    reason = (
        f"degraded: {int(100 * share)}% of the experts are in memory, the others are read from {_elsewhere(facts)} when"
        f" they are needed, for which a step of one token waits about {1000 * stall_s:.3g} ms"
    )
    if facts.goal.resident_share > share:
        reason += f"; {int(100 * facts.goal.resident_share)}% will be"
    return Readiness(ready=True, reason=reason, resident=share)


def _elsewhere(facts: Facts) -> str:
    assert facts.spec is not None
    hosted = bool((facts.spec.placement.tiers == Tier.HOST).any())
    return "the host's memory or disk" if hosted else "disk"


def progress(facts: Facts, operation: Operation) -> Progress:
    gone = all(w not in facts.records or not facts.records[w].alive for w in operation.retiring)
    return Progress(_share(facts, operation), bool(operation.retiring) and gone)


def _share(facts: Facts, operation: Operation) -> float:
    if operation.phase in ENDED:
        return float(operation.error is None)
    if facts.change is not None and facts.change.operation_id == operation.operation_id:
        return SHARES[facts.change.stage]
    if operation.kind is OperationKind.REBALANCE:
        return 0.0
    # workers load first
    return 0.5 * min(1.0, len(facts.loaded) / max(1, facts.target))
