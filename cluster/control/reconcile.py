"""Compares the cluster with what it should be: which workers to start or keep, and which serve which experts.

Each function takes the facts and the time, and returns a choice with its reason. ControlState carries the choices out.

Legend: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elastic_moe.cluster.facts.adaptation import adapt
from elastic_moe.cluster.facts.facts import Choice, Facts
from elastic_moe.cluster.facts.membership import BoolArray, WorkerRecord
from elastic_moe.cluster.messages.views import OperationKind, WorkerState
from elastic_moe.cluster.placement import Placement, Worker, WorkerId

JOIN_PATIENCE_S = 5.0
"""Seconds that a loaded worker waits for others that are starting, so that they join in one epoch."""
RESTART_PATIENCE_S = 60.0
"""Longest such wait in seconds after all workers were lost. Within it, the wait is as long as the first one loaded."""
SURVIVORS_FIRST_S = 5.0
"""Seconds after a loss in which the survivors recover before new workers are started."""

# --- How many workers ---------------------------------------------------------------------------------------------


def kept(facts: Facts) -> tuple[WorkerId, ...]:
    """Surplus workers that were to leave, and are needed again because others were lost."""
    surplus = [m.id for m in facts.alive if m.state is WorkerState.DRAINING and not m.retired]
    return tuple(surplus[: max(0, facts.target - len(facts.staying))])


def starts(facts: Facts, now: float) -> Choice[list[BoolArray]]:
    """For each worker to start now, the experts that it loads ([L, E])."""
    present = len(facts.staying)
    if present >= facts.target:
        return Choice([], "there are as many workers as there should be")
    if now < facts.start_at:
        return Choice([], "the last worker died while it loaded: the next is started after a pause")
    if recovers_alone(facts, now):
        return Choice([], "survivors serve again first: until then they need the cores and the disk")
    return Choice(shares(facts, facts.target - present), f"{present} of {facts.target} workers are there")


def recovers_alone(facts: Facts, now: float) -> bool:
    """Whether the survivors recover first. Meanwhile a worker that loads would take cores and disk from them."""
    if facts.outage is None or now - facts.outage.since >= SURVIVORS_FIRST_S:
        return False
    survivors = [record for record in facts.alive if record.id in facts.ranks]
    return bool(survivors) and facts.fits(survivors)


def shares(facts: Facts, missing: int) -> list[BoolArray]:
    """For each of `missing` new workers, the experts that it loads from the checkpoint ([L, E]).

    They are first of all those that no worker holds, and then an even share of the others. New workers get no copies
    from workers that serve, because copying would slow their steps.
    """
    held = np.zeros(facts.load.shape, dtype=np.bool_)
    for record in facts.alive:
        held |= record.has if record.loaded else record.assigned
    team = len(facts.staying) + missing
    found = [np.zeros_like(held) for _ in range(missing)]
    for layer in range(facts.model.num_layers):
        experts = np.lexsort((-facts.load[layer], held[layer]))
        lost = experts[: int((~held[layer]).sum())]
        for part, share in enumerate(found):
            share[layer, np.array_split(np.sort(lost), missing)[part]] = True
            # every team-th expert by load, so that each share has heavy and light ones
            room = facts.model.num_logical_experts // team - int(share[layer].sum())
            share[layer, experts[len(lost) :][part::team][: max(0, room)]] = True
    return found


# --- Who serves ---------------------------------------------------------------------------------------------------


def next_members(facts: Facts, now: float) -> Choice[tuple[WorkerRecord, ...]]:
    """The members of the epoch that should begin now; empty if none should begin."""
    if facts.change is not None:
        return Choice((), f"epoch {facts.change.spec.epoch} is under way")
    if facts.probing:
        return Choice((), "workers are being asked for a sign of life")
    if now < facts.retry_at:
        return Choice((), "the last change failed: the next is begun after a pause")
    choice = _should_serve(facts, now)
    if facts.outage is None and tuple(record.id for record in choice.value) == facts.ranks:
        return Choice((), choice.reason)
    return choice


def _should_serve(facts: Facts, now: float) -> Choice[tuple[WorkerRecord, ...]]:
    """The workers that should serve now, whether they do or not; empty: no worker serves yet."""
    # draining workers continue to serve only if the others cannot hold every expert
    wanted = [record for record in facts.loaded if record.state is not WorkerState.DRAINING]
    if not facts.fits(wanted):
        wanted = facts.loaded
    if not facts.fits(wanted):
        return Choice((), "the workers that have loaded have too little memory for every expert")
    current = [record for record in wanted if record.id in facts.ranks]
    if facts.outage is not None and facts.fits(current):
        return Choice(tuple(current), "the survivors serve first")
    if len(wanted) < facts.target and (wait := _waits_for_more(facts, wanted, now)) is not None:
        return wait
    return Choice(tuple(wanted), f"{len(wanted)} workers can serve")


def _waits_for_more(
    facts: Facts, wanted: Sequence[WorkerRecord], now: float
) -> Choice[tuple[WorkerRecord, ...]] | None:
    """The choice to wait, so that workers that are starting join in the same epoch; None: do not wait."""
    current = [record for record in wanted if record.id in facts.ranks]
    joining = [record for record in wanted if record.id not in facts.ranks]
    first = min(joining, key=lambda record: record.loaded_at or now, default=None)
    loaded_at = now if first is None else first.loaded_at or now
    waited = now - loaded_at
    if not current:
        took = 0.0 if first is None else loaded_at - first.asked_at
        if facts.spec is None:
            return Choice((), f"{len(wanted)} of {facts.target} workers have loaded")
        if waited < min(took, RESTART_PATIENCE_S):
            return Choice((), "workers that have loaded wait for others, as long as the first one took to load")
    elif facts.outage is None and waited < JOIN_PATIENCE_S:
        # without the joining worker, the others may have too little memory
        stay = current if facts.fits(current) else ()
        return Choice(tuple(stay), "workers that have loaded wait for others that are starting")
    return None


def placement_for(facts: Facts, members: Sequence[WorkerRecord]) -> Placement:
    """The placement for `members` that moves the fewest experts."""
    slots = facts.slots(members)
    assert slots is not None, "members are chosen so that they hold every expert"
    workers = []
    for record, count in zip(members, slots, strict=True):
        assert record.info is not None, f"{record.id} has not loaded"
        workers.append(Worker(id=record.id, node=record.info.node, slots=count))
    return adapt(workers, {record.id: record.has for record in members}, facts.load)


def wish(facts: Facts, members: Sequence[WorkerRecord]) -> Choice[OperationKind]:
    """The kind of operation that an epoch of `members` belongs to, with the workers that join and leave."""
    if facts.spec is None:
        kind = OperationKind.START
    else:
        kind = OperationKind.SCALE if facts.outage is None else OperationKind.RECOVER
    joining = [record.id for record in members if record.id not in facts.ranks]
    leaving = [worker for worker in facts.ranks if worker not in {record.id for record in members}]
    words = [f"{' and '.join(ids)} {verb}" for ids, verb in ((joining, "to join"), (leaving, "to leave")) if ids]
    return Choice(kind, ", ".join(words) or "a new group")
