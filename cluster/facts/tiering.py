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
from elastic_moe.cluster.placement import EMPTY, Placement, Tier, WorkerId

CACHE_PART = 4
"""One slot of so many is the cache area, where a device is too small for all experts of its worker. On traces whose
second half is like the first, plans with half of it wait up to 3 % less; more of it forgives a change of subject."""
KEEP_BONUS = 1.25
"""An expert outside the device must be so many times heavier than one inside to take its place when members change."""

IntCounts = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a worker with a disk tier has for experts."""

    device: int
    """Experts over all layers that fit in its device, those of the cache area included."""
    host: int = 0
    """Experts over all layers that fit in pinned memory."""
    disk_bytes_per_s: float = 1e9
    host_bytes_per_s: float | None = None
    """Rate at which experts come from pinned memory; None where there is none."""

    def affordable(self, budget_s: float | None, expert_bytes: int, *, at_least: int = 0) -> int | None:
        """Experts that are read from disk in `budget_s` seconds, or `at_least` so many; None: without a limit."""
        return None if budget_s is None else max(at_least, int(budget_s * self.disk_bytes_per_s / max(1, expert_bytes)))


def cache_slots_of(device: int) -> int:
    """Slots of each layer that are the cache area of a device with room for `device` experts of each, where its worker
    serves more of them."""
    return max(1, device // CACHE_PART)


def pins_of(device: int) -> int:
    """Experts per layer that stay in such a device."""
    return device - cache_slots_of(device)


def memory_of(inside: BoolArray, served: BoolArray) -> int:
    """Experts that a device must have room for, if `inside` ([L, E]) lie there and `served` may be needed: each layer
    in which some expert lies elsewhere needs at least one slot for those."""
    return int(inside.sum()) + int((served & ~inside).any(axis=1).sum())


def fits_in(placement: Placement, worker: WorkerId, room: Room) -> bool:
    """Whether the experts that `placement` puts into the device and the pinned memory of `worker` fit there."""
    hosted = (placement.tiers == Tier.HOST) & (placement.slot_to_worker == placement.rank_of(worker))
    return memory_of(needs(placement, worker), serves(placement, worker)) <= room.device and hosted.sum() <= room.host


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
        if memory_of(served := serves(placement, worker.id), served) <= room.device:
            continue
        weight = (load + 1.0) * np.where(has[worker.id], KEEP_BONUS, 1.0)
        slots = slice(placement.first_slot[rank], placement.first_slot[rank] + worker.slots)
        device, host = room.device // placement.num_layers, room.host // placement.num_layers
        for layer in range(placement.num_layers):
            experts = placement.physical_to_logical_map[layer, slots]
            tiers[layer, slots] = _tiers_of_layer(experts, weight[layer], device, host)
    return replace(placement, tiers=tiers)


def _tiers_of_layer(
    experts: npt.NDArray[np.int32], weight: npt.NDArray[np.float64], device: int, host: int
) -> list[int]:
    """[slots] tier of each slot that holds `experts` ([slots], or EMPTY). device, host: experts that fit there."""
    served = np.flatnonzero(experts != EMPTY)
    tiers = np.full(len(experts), Tier.DEVICE)
    if len(served) > device:
        # ties go to the lower number: equal inputs give equal placements
        order = served[np.lexsort((experts[served], -weight[experts[served]]))]
        pins = pins_of(device)
        tiers[order[pins:]] = Tier.HOST
        tiers[order[pins + host :]] = Tier.DISK
    return [int(tier) for tier in tiers]


def next_step(
    goal: Placement,
    current: Placement | None,
    rooms: Mapping[WorkerId, Room | None],
    has: Mapping[WorkerId, BoolArray],
    occupied: Mapping[WorkerId, BoolArray],
    load: IntCounts,
    *,
    lately: Mapping[WorkerId, BoolArray] | None = None,
    most_new: Mapping[WorkerId, int | None],
) -> Placement:
    """The nearest placement to `goal` that can be reached by one change: some experts of devices still lie on disk.

    current: the placement in force. has: [L, E] per worker, what lies in its device. occupied: the same with whatever
    else may lie there until the change is made; what is new must fit beside that, and beside a slot for each layer in
    which the worker serves more than it has, now or then.
    lately: [L, E] what a worker may serve besides, by a flip whose outcome is not known.
    most_new: experts that each worker may bring, over all layers; None: no limit. The heaviest come first.
    """
    tiers = goal.tiers.copy()
    for worker in goal.workers:
        room = rooms.get(worker.id)
        if room is None:
            continue
        held = has[worker.id]
        served = held | serves(goal, worker.id)
        if current is not None and any(member.id == worker.id for member in current.workers):
            served = served | serves(current, worker.id)
        if lately is not None and worker.id in lately:
            served = served | lately[worker.id]
        new = needs(goal, worker.id) & ~held
        free = room.device - memory_of(held, served) - int((occupied[worker.id] & ~held).sum())
        outside = (served & ~held).sum(axis=1)
        late = new & ~_first_of(new, outside, free, load, most_new[worker.id])
        tiers[_slots_of(goal, worker.id, late)] = Tier.DISK
    return replace(goal, tiers=tiers)


def _first_of(new: BoolArray, outside: npt.NDArray[np.int_], free: int, load: IntCounts, most: int | None) -> BoolArray:
    """[L, E] the heaviest of `new`, up to `most`, for which a device has `free` room. outside: [L] experts that the
    worker serves and does not have."""
    layers, experts = np.nonzero(new)
    first = np.zeros_like(new)
    outside = outside.copy()
    left = len(layers) if most is None else most
    for at in np.lexsort((experts, layers, -load[layers, experts])):
        # the last one of a layer takes the slot that was left for it
        takes = int(outside[layers[at]] > 1)
        if left > 0 and takes <= free:
            first[layers[at], experts[at]] = True
            outside[layers[at]] -= 1
            free -= takes
            left -= 1
    return first


def _slots_of(placement: Placement, worker: WorkerId, experts: BoolArray) -> BoolArray:
    """[L, S] the slots of `worker` that hold `experts` ([L, E])."""
    table = placement.physical_to_logical_map
    mine = placement.slot_to_worker == placement.rank_of(worker)
    chosen = np.take_along_axis(experts, np.maximum(table, 0).astype(np.int64), axis=1)
    return np.asarray(chosen & (table != EMPTY) & mine)


# --- What it costs ------------------------------------------------------------------------------------------------


def expected_stall_s(
    placement: Placement, rooms: Mapping[WorkerId, Room | None], model: ModelInfo, load: IntCounts, tokens: int
) -> float:
    """Seconds that a step of `tokens` tokens is predicted to wait for experts that lie in no device. A step waits in
    each layer for the worker that has most to bring.

    load: [L, E] tokens that chose each expert lately; those of a layer that has none are taken to be equally popular.
    The cache area of a worker counts as if it held the most popular ones of what is not always in its device, but for
    the slot in each layer through which the others pass.
    """
    active = 1.0 - (1.0 - _chances(load, model.top_k)) ** tokens
    fastest = _fastest_tiers(placement)
    seconds = np.zeros(placement.num_layers)
    for worker in placement.workers:
        if (room := rooms.get(worker.id)) is not None:
            fetch_s = _fetch_seconds(placement, worker.id, fastest, room, model.expert_bytes) * active
            seconds = np.maximum(seconds, _beyond_cache(fetch_s, needs(placement, worker.id), room).sum(axis=1))
    return float(seconds.sum())


def _chances(load: IntCounts, top_k: int) -> FloatArray:
    """[L, E] chance that a token chooses an expert."""
    counted = np.where(load.sum(axis=1, keepdims=True) > 0, load, 1).astype(np.float64)
    return np.asarray(np.minimum(1.0, top_k * counted / counted.sum(axis=1, keepdims=True)))


def _fastest_tiers(placement: Placement) -> IntCounts:
    """[L, E] the tier from which an expert is served: of replicas, the one in the fastest tier is computed."""
    layers, slots = np.nonzero(placement.physical_to_logical_map != EMPTY)
    fastest = np.full((placement.num_layers, placement.num_logical_experts), max(Tier), dtype=np.int64)
    at = (layers, placement.physical_to_logical_map[layers, slots])
    np.minimum.at(fastest, at, placement.tiers[layers, slots].astype(np.int64))
    return fastest


def _fetch_seconds(
    placement: Placement, worker: WorkerId, fastest: IntCounts, room: Room, expert_bytes: int
) -> FloatArray:
    """[L, E] seconds to bring each expert that the worker computes and does not have in its device; 0 for others."""
    host_rate = room.host_bytes_per_s or room.disk_bytes_per_s
    rates = {Tier.HOST: host_rate, Tier.DISK: room.disk_bytes_per_s}
    outside = serves(placement, worker) & ~needs(placement, worker)
    chosen = [outside & (fastest == tier) for tier in rates]
    return np.asarray(np.select(chosen, [expert_bytes / rate for rate in rates.values()], 0.0))


def _beyond_cache(fetch_s: FloatArray, inside: BoolArray, room: Room) -> FloatArray:
    """[L, E] what is fetched if the cache area holds the most expensive experts of each layer, ascending."""
    missing = (fetch_s > 0).sum(axis=1)
    slots = max(0, room.device - int(inside.sum())) // max(1, int((missing > 0).sum()))
    ordered = np.sort(fetch_s, axis=1)
    experts = fetch_s.shape[1]
    for layer, count in enumerate(missing):
        # where the area holds all of them, none needs to pass
        cached = count if slots >= count else max(0, slots - 1)
        ordered[layer, experts - cached :] = 0.0
    return ordered
