"""Which of the experts that a worker serves lie in its device, and how a placement's tiers are reached in steps.

A device that is too small for all experts of its worker keeps the heaviest of each layer for the whole epoch (pinned),
and leaves some slots per layer as a cache area for the others. The others lie on disk: to give one to a worker takes no
copy. So any placement can begin at once, with fewer experts in devices than it should have in the end (its *goal*).

Legend: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.facts.membership import BoolArray, needs, serves
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.placement import Placement, Tier, WorkerId

CACHE_PART = 4
"""One slot of so many is the cache area, where a device is too small for all experts of its worker."""
KEEP_BONUS = 1.25
"""An expert outside the device must be so many times heavier than one inside to take its place when members change."""

IntCounts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a worker with a disk tier has for experts."""

    device: int
    """Experts per layer that fit in its device, the cache area included."""
    host: int = 0
    """Experts per layer that fit in pinned memory."""
    disk_bytes_per_s: float = 1e9

    def affordable(self, budget_s: float | None, expert_bytes: int) -> int | None:
        """Experts that are read from disk in `budget_s` seconds; None: without a limit."""
        return None if budget_s is None else int(budget_s * self.disk_bytes_per_s / max(1, expert_bytes))


def pins_of(device: int) -> int:
    """Experts per layer that stay in a device with room for `device`, where its worker serves more than that."""
    return device - max(1, device // CACHE_PART)


def fits_in(placement: Placement, worker: WorkerId, room: Room) -> bool:
    """Whether the experts that `placement` puts into the device of `worker` fit there, beside a cache area if the
    worker serves more than its device holds."""
    pinned = needs(placement, worker).sum(axis=1)
    served = serves(placement, worker).sum(axis=1)
    most = np.where(served > room.device, room.device - 1, room.device)
    return bool((pinned <= most).all())


def assign_tiers(
    placement: Placement, rooms: Mapping[WorkerId, Room | None], has: Mapping[WorkerId, BoolArray], load: IntCounts
) -> Placement:
    """`placement` with the heaviest experts of each worker in its device, the next in pinned memory, the rest on disk.

    rooms: None for a worker without a disk tier, which keeps all its experts in its device.
    has: [L, E] per worker, what lies in its device now; such experts stay unless others are clearly heavier.
    load: [L, E] tokens per expert, zeros where unknown.
    """
    tiers = np.zeros_like(placement.tiers)
    for rank, worker in enumerate(placement.workers):
        room = rooms.get(worker.id)
        if room is None:
            continue
        weight = (load + 1.0) * np.where(has[worker.id], KEEP_BONUS, 1.0)
        slots = slice(placement.first_slot[rank], placement.first_slot[rank] + worker.slots)
        for layer in range(placement.num_layers):
            experts = placement.physical_to_logical_map[layer, slots]
            tiers[layer, slots] = _tiers_of_layer(experts, weight[layer], room)
    return replace(placement, tiers=tiers)


def _tiers_of_layer(experts: npt.NDArray[np.int32], weight: npt.NDArray[np.float64], room: Room) -> list[int]:
    """[slots] tier of each slot that holds `experts` ([slots], or EMPTY)."""
    served = np.flatnonzero(experts >= 0)
    tiers = np.full(len(experts), Tier.DEVICE)
    if len(served) > room.device:
        # ties go to the lower number: equal inputs give equal placements
        order = served[np.lexsort((experts[served], -weight[experts[served]]))]
        pins = pins_of(room.device)
        tiers[order[pins:]] = Tier.HOST
        tiers[order[pins + room.host :]] = Tier.DISK
    return [int(tier) for tier in tiers]


def next_step(
    goal: Placement,
    current: Placement | None,
    rooms: Mapping[WorkerId, Room | None],
    has: Mapping[WorkerId, BoolArray],
    load: IntCounts,
    *,
    most_new: Mapping[WorkerId, int | None],
) -> Placement:
    """The nearest placement to `goal` that can be reached by one change: some experts of devices still lie on disk.

    current: the placement in force. has: [L, E] per worker, what lies in its device until the change is made; what is
    new must fit beside it, and beside one slot of cache area per layer where the worker serves more than its device
    holds, now or then.
    most_new: experts that each worker may bring, over all layers; None: no limit. The heaviest come first.
    """
    tiers = goal.tiers.copy()
    for worker in goal.workers:
        room = rooms.get(worker.id)
        if room is None:
            continue
        held = has[worker.id]
        involved = held | serves(goal, worker.id)
        if current is not None and any(member.id == worker.id for member in current.workers):
            involved = involved | serves(current, worker.id)
        most = np.where(involved.sum(axis=1) > room.device, room.device - 1, room.device)
        late = _too_many(needs(goal, worker.id) & ~held, most - held.sum(axis=1), load, most_new[worker.id])
        tiers[_slots_of(goal, worker.id, late)] = Tier.DISK
    return replace(goal, tiers=tiers)


def _too_many(new: BoolArray, room: npt.NDArray[np.int_], load: IntCounts, most: int | None) -> BoolArray:
    """[L, E] those of `new` that must wait: all but the heaviest `room` ([L]) of each layer, and `most` of all."""
    late = new.copy()
    layers, experts = np.nonzero(new)
    free = room.copy()
    left = len(layers) if most is None else most
    for at in np.lexsort((experts, layers, -load[layers, experts])):
        if left > 0 and free[layers[at]] > 0:
            late[layers[at], experts[at]] = False
            free[layers[at]] -= 1
            left -= 1
    return late


def _slots_of(placement: Placement, worker: WorkerId, experts: BoolArray) -> BoolArray:
    """[L, S] the slots of `worker` that hold `experts` ([L, E])."""
    table = placement.physical_to_logical_map
    mine = placement.slot_to_worker == placement.rank_of(worker)
    chosen = np.take_along_axis(experts, np.maximum(table, 0).astype(np.int64), axis=1)
    return chosen & (table >= 0) & mine


# --- What it costs ------------------------------------------------------------------------------------------------


def expected_stall_s(
    placement: Placement, rooms: Mapping[WorkerId, Room | None], model: ModelInfo, tokens: int
) -> float:
    """Seconds that a step of `tokens` tokens is predicted to wait for experts from disk, if all are equally popular and
    no cache helps. A step waits in each layer for the worker that has most to bring.
    """
    active = 1.0 - (1.0 - min(1.0, model.top_k / model.num_logical_experts)) ** tokens
    seconds = np.zeros(placement.num_layers)
    for worker in placement.workers:
        room = rooms.get(worker.id)
        if room is not None:
            outside = (serves(placement, worker.id) & ~needs(placement, worker.id)).sum(axis=1)
            seconds = np.maximum(seconds, outside * active * model.expert_bytes / room.disk_bytes_per_s)
    return float(seconds.sum())
