"""Compares the cluster with what it should be: which workers to start or keep, and which serve which experts.

Each function takes the facts and the time, and returns a choice with its reason. cluster/control/upkeep.py carries the
choices out.

Legend: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elastic_moe.cluster.decisions.joining import together
from elastic_moe.cluster.facts.adaptation import adapt
from elastic_moe.cluster.facts.facts import Choice, Facts
from elastic_moe.cluster.facts.membership import BoolArray, WorkerRecord, entries, serves
from elastic_moe.cluster.facts.tiering import assign_tiers, next_step, pins_of
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.views import OperationKind, WorkerState
from elastic_moe.cluster.placement import Placement, Worker, WorkerId

JOIN_PATIENCE_S = 5.0
"""Seconds that a loaded worker waits for others that are starting, so that they join in one epoch."""
RESTART_PATIENCE_S = 60.0
"""Longest such wait in seconds after all workers were lost. Within it, the wait is as long as the first one loaded."""
SURVIVORS_FIRST_S = 5.0
"""Seconds that survivors get to serve again before others are started."""
READ_FIRST_S = 0.5
"""Seconds that survivors may read lost experts before they serve again. The rest is served from disk at first."""
PROMOTION_S = 10.0
"""Seconds that one promotion may read, unless one expert takes longer. What it brings is kept from then on, and what a
longer one brings could be lost longer."""
PROMOTION_PATIENCE_S = 5.0
"""Seconds that a new epoch serves without promotions while workers are starting, which read from disk too."""

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
    return Choice(shares(facts, facts.target - present), f"{present} of {counted(facts.target, 'worker')} are there")


def recovers_alone(facts: Facts, now: float) -> bool:
    """Whether the survivors recover first. Meanwhile a worker that loads would take cores and disk from them."""
    if facts.outage is None or now - facts.outage.since >= SURVIVORS_FIRST_S:
        return False
    survivors, _ = facts.split(facts.alive)
    return bool(survivors) and facts.fits(survivors)


def shares(facts: Facts, missing: int) -> list[BoolArray]:
    """For each of `missing` new workers, the experts that it loads from the checkpoint ([L, E]).

    They are first of all those that no worker holds, and then an even share of the others. New workers get no copies
    from workers that serve, because copying would slow their steps.
    """
    held = np.zeros(facts.load.shape, dtype=np.bool_)
    for record in facts.alive:
        held |= record.has if record.loaded else record.assigned
    num_layers, num_experts = facts.model.num_layers, facts.model.num_logical_experts
    team = len(facts.staying) + missing
    most = _most_loaded(facts, team)
    found = np.zeros((missing, num_layers, num_experts), dtype=np.bool_)
    num_lost = (~held).sum(axis=1, keepdims=True)
    # all layers at once: the coordinator's loop waits for it. Each expert's place among the lost ones, or among the
    # others: by number, and by load, the heaviest first
    number = (~held).cumsum(axis=1) - 1
    place = np.lexsort((-facts.load, held)).argsort(axis=1)
    whole, more = num_lost // missing, num_lost % missing
    in_longer = number < more * (whole + 1)
    beyond = number - more * (whole + 1)
    part = np.where(in_longer, number // (whole + 1), more + beyond // np.maximum(whole, 1))
    order = np.where(in_longer, number % (whole + 1), beyond % np.maximum(whole, 1))
    if most is not None:
        # the heaviest of them, dealt out, where they do not all fit
        all_fit = -(-num_lost // missing) <= most
        part = np.where(all_fit, part, place % missing)
        order = np.where(all_fit, order, place // missing)
    layers, experts = entries(~held & (order < (num_experts if most is None else most)))
    found[part[layers, experts], layers, experts] = True
    # heavy and light ones, as many as an even share has
    even = num_experts // team
    room = (even if most is None else min(even, most)) - found.sum(axis=2)
    part, order = (place - num_lost) % team, (place - num_lost) // team
    layers, experts = entries(held & (part < missing))
    part, order = part[layers, experts], order[layers, experts]
    given = order < room[part, layers]
    found[part[given], layers[given], experts[given]] = True
    return list(found)


def _most_loaded(facts: Facts, team: int) -> int | None:
    """Experts per layer that a new worker is to load into its device: as many as fit there, or as stay there if an even
    share does not fit. None: as far as is known, memory is not limited, or the worker needs all that it is given."""
    if facts.usual_capacity is None or not facts.usually_tiered:
        return None
    device = facts.usual_capacity // facts.model.num_layers
    return device if -(-facts.model.num_logical_experts // team) <= device else pins_of(device)


# --- Who serves ---------------------------------------------------------------------------------------------------


def next_members(facts: Facts, now: float) -> Choice[tuple[WorkerRecord, ...]]:
    """The members of the epoch to begin now; empty if no epoch is to begin. A promotion under way gives way to it."""
    if facts.change is not None and not facts.change.yields:
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
    current, _ = facts.split(wanted)
    if facts.outage is not None and facts.fits(current):
        return Choice(tuple(together(facts, current)), "the survivors serve first")
    group = together(facts, wanted)
    if len(group) < len(wanted):
        return Choice(tuple(group), "the others could not join, and are tried one by one")
    if len(wanted) < facts.target and (wait := _waits_for_more(facts, wanted, now)) is not None:
        return wait
    return Choice(tuple(wanted), f"{counted(len(wanted), 'worker')} can serve")


def _waits_for_more(
    facts: Facts, wanted: Sequence[WorkerRecord], now: float
) -> Choice[tuple[WorkerRecord, ...]] | None:
    """The choice to wait, so that workers that are starting join in the same epoch; None: do not wait."""
    current, joining = facts.split(wanted)
    first = min(joining, key=lambda record: record.loaded_at or now, default=None)
    loaded_at = now if first is None else first.loaded_at or now
    waited = now - loaded_at
    if not current:
        took = 0.0 if first is None else loaded_at - first.asked_at
        if facts.spec is None:
            return Choice((), f"{len(wanted)} of {counted(facts.target, 'worker')} have loaded")
        if waited < min(took, RESTART_PATIENCE_S):
            return Choice((), "workers that have loaded wait for others, as long as the first one took to load")
    elif facts.outage is None and waited < JOIN_PATIENCE_S:
        # without the joining worker, the others may have too little memory
        stay = current if facts.fits(current) else ()
        return Choice(tuple(stay), "workers that have loaded wait for others that are starting")
    return None


def placement_for(facts: Facts, members: Sequence[WorkerRecord]) -> Placement:
    """The placement that `members` are to have in the end: it moves as little as possible, and puts the heaviest
    experts into devices that are too small for all."""
    slots = facts.slots(members)
    assert slots is not None, "members are chosen so that they can serve every expert"
    workers = []
    for record, count in zip(members, slots, strict=True):
        assert record.info is not None, f"{record.id} has not loaded"
        workers.append(Worker(id=record.id, node=record.info.node, slots=count))
    has = {record.id: record.has for record in members}
    nothing, ranks = np.zeros(facts.load.shape, dtype=np.bool_), set(facts.ranks)
    served = {
        record.id: nothing if facts.spec is None or record.id not in ranks else serves(facts.spec.placement, record.id)
        for record in members
    }
    placement = adapt(workers, has, facts.load, served)
    return assign_tiers(placement, facts.rooms(members), has, facts.load)


def step_to(facts: Facts, goal: Placement, budget_s: float | None, *, at_least: int = 0) -> Placement:
    """The next placement on the way to `goal`. budget_s: seconds for which each of its members may read experts for it;
    None: as long as it takes. at_least: experts that each may read even if they take longer."""
    members = [facts.records[worker.id] for worker in goal.workers]
    rooms = facts.rooms(members)
    return next_step(
        goal,
        None if facts.spec is None else facts.spec.placement,
        rooms,
        {record.id: record.has for record in members},
        {record.id: record.has | record.perhaps for record in members},
        facts.load,
        lately={record.id: record.perhaps_serves for record in members if record.perhaps_serves is not None},
        most_new={
            worker: None if room is None else room.affordable(budget_s, facts.model.expert_bytes, at_least=at_least)
            for worker, room in rooms.items()
        },
    )


def promotion(facts: Facts, now: float) -> Choice[Placement | None]:
    """The next placement on the way to the one in force's goal, if it is time to bring experts into devices."""
    if not (facts.idle and facts.serves):
        return Choice(None, "something else is under way")
    assert facts.spec is not None
    assert facts.goal is not None
    if facts.goal == facts.spec.placement:
        return Choice(None, "every expert lies in its tier")
    if now < facts.retry_at:
        return Choice(None, "the last change failed: the next is begun after a pause")
    coming = any(record.state is WorkerState.STARTING for record in facts.alive)
    if coming and now - facts.epoch_since < PROMOTION_PATIENCE_S:
        return Choice(None, "workers that are starting may take experts over")
    # workers that share a slow disk may need longer for one expert, and without that one they would never begin
    step = step_to(facts, facts.goal, PROMOTION_S, at_least=1)
    if step == facts.spec.placement:
        return Choice(None, "no device has room for another expert")
    missing = facts.goal.resident_share - facts.spec.placement.resident_share
    return Choice(step, f"another {missing:.0%} of the experts fit in devices")


def wish(facts: Facts, members: Sequence[WorkerRecord]) -> Choice[OperationKind]:
    """The kind of operation that an epoch of `members` belongs to, with the workers that join and leave."""
    if facts.spec is None:
        kind = OperationKind.START
    else:
        kind = OperationKind.SCALE if facts.outage is None or facts.rests else OperationKind.RECOVER
    names = {record.id for record in members}
    joining = [record.id for record in facts.split(members)[1]]
    leaving = [worker for worker in facts.ranks if worker not in names]
    words = [f"{' and '.join(ids)} {verb}" for ids, verb in ((joining, "to join"), (leaving, "to leave")) if ids]
    if any(facts.records[worker].moves for worker in leaving):
        words[-1] += ", as workers spread over nodes that have come"
    return Choice(kind, ", ".join(words) or "a new group")
