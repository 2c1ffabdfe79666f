"""Which placements a re-placement may go to: when a planner is asked, whether its plan is carried out, and what the
members' memory allows.

The owner, who asks and carries out, is cluster/control/rebalancing.py.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.facts.events import PlanReady
from elastic_moe.cluster.facts.facts import Choice, Facts, Planning
from elastic_moe.cluster.facts.membership import needs
from elastic_moe.cluster.facts.tiering import assign_tiers, fits_in
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.placement import Placement


class Judgement(StrEnum):
    """What to do with a planner's answer."""

    ADOPTED = "adopted"
    KEPT = "kept"
    """The placement in force stays."""
    REFUSED = "refused"
    """The answer has no placement that the present workers can take."""


def worth_a_look(facts: Facts) -> Choice[bool]:
    """Whether the periodic look asks a planner for a better placement."""
    if not facts.load.any():
        return Choice(False, "nothing was counted yet")
    if facts.pinned:
        return Choice(False, "the placement is pinned")
    if len(facts.ranks) < 2:
        # a planner's process takes two seconds of a core
        return Choice(False, "a lone worker holds all experts wherever they are")
    return Choice(True, "periodic look at the placement")


def judge(facts: Facts, planning: Planning, answer: PlanReady) -> Choice[Judgement]:
    """What to do with a planner's answer."""
    assert facts.spec is not None
    placement = answer.placement
    if placement is None:
        return Choice(Judgement.REFUSED, answer.reason)
    if (short := too_much(facts, placement)) is not None:
        return Choice(Judgement.REFUSED, short)
    if tuple(worker.id for worker in placement.workers) != facts.ranks:
        return Choice(Judgement.REFUSED, answer.reason)
    wanted = answer.worthwhile or planning.forced or (planning.requested and answer.no_worse)
    if with_tiers(facts, placement) == facts.goal or not wanted:
        return Choice(Judgement.KEPT, f"placement kept, {answer.reason}")
    return Choice(Judgement.ADOPTED, answer.reason if answer.worthwhile else f"carried out, although {answer.reason}")


def room(facts: Facts) -> int | None:
    """Experts that any member could take beside what it holds; None where memory does not limit that. If there is no
    room, members with a disk tier serve from there what comes until they have dropped what goes."""
    members = [facts.records[worker] for worker in facts.ranks]
    rooms = [record.capacity - int(record.has.sum()) for record in members if record.capacity is not None]
    least = max(0, min(rooms)) if rooms else None
    return None if least == 0 and facts.tiered(members) else least


def too_much(facts: Facts, placement: Placement) -> str | None:
    """Returns an error if a member lacks memory for its old and new experts together, which it holds until the flip."""
    for worker in placement.workers:
        record = facts.records.get(worker.id)
        if record is None or record.capacity is None or record.tiered:
            continue
        both = int((record.has | needs(placement, worker.id)).sum())
        if both > record.capacity:
            return (
                f"{worker.id} has memory for {counted(record.capacity, 'expert')}, and while they move it would hold "
                f"{both}: move fewer at a time"
            )
    return None


def with_tiers(facts: Facts, placement: Placement) -> Placement:
    """`placement` as it is if its tiers fit the members' devices, else with the heaviest experts in them."""
    members = [facts.records[worker] for worker in facts.ranks]
    rooms = facts.rooms(members)
    if all(room is None or fits_in(placement, worker, room) for worker, room in rooms.items()):
        return placement
    return assign_tiers(placement, rooms, {record.id: record.has for record in members}, facts.load)


def _crowded(facts: Facts, placement: Placement) -> str | None:
    """Why the tiers that `placement` gives do not fit; None where they do, or where it gives none."""
    if placement.all_resident:
        return None
    rooms = facts.rooms([facts.records[worker] for worker in facts.ranks])
    for worker, room in rooms.items():
        if room is None:
            return f"{worker} keeps all its experts in its device"
        if not fits_in(placement, worker, room):
            return (
                f"{worker} has room for {counted(room.device, 'expert')} in its device, of which one in each layer "
                f"that does not fit is for the others, and for {room.host} in pinned memory"
            )
    return None


def of_members(facts: Facts, placement: Placement) -> Placement:
    """`placement` on today's nodes, with tiers where it gives none and not everything fits. Raises PlacementError where
    it is not for these workers and this model."""
    assert facts.spec is not None
    current = facts.spec.placement
    for what, asked, there in (
        ("workers", _slots(placement), _slots(current)),
        ("num_logical_experts", placement.num_logical_experts, current.num_logical_experts),
        ("num_layers", placement.num_layers, current.num_layers),
    ):
        if asked != there:
            raise PlacementError(f"placement: {what}: expected {there}, as at present, got {asked}")
    # a saved placement may be from before a restart, when nodes had other ids
    placement = replace(placement, workers=current.workers)
    if (short := too_much(facts, placement)) is not None:
        raise PlacementError(f"placement: physical_to_logical_map: {short}")
    if (short := _crowded(facts, placement)) is not None:
        raise PlacementError(f"placement: tiers: {short}")
    return with_tiers(facts, placement)


def _slots(placement: Placement) -> str:
    return ", ".join(f"{worker.id} with {counted(worker.slots, 'slot')}" for worker in placement.workers)
