"""What follows from a set of workers: their slots, the placement that moves the fewest experts, and the transport.

Legend: L MoE layers, E logical experts, W workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.facts.membership import BoolArray, Indices, entries
from elastic_moe.cluster.messages.epochs import TransportKind, WorkerInfo
from elastic_moe.cluster.placement import EMPTY, Placement, Worker, WorkerId

Counts = npt.NDArray[np.int32]


def slots_of(limits: Sequence[int], num_experts: int, redundant_experts: int) -> tuple[int, ...] | None:
    """Slots of each worker per layer: an even share of all experts and of the spare slots, and no more than its limit.

    limits: experts per layer that each worker has memory for. If memory is short, there are fewer spare slots. Returns
    None if all workers together cannot hold every expert once.
    """
    limits = [min(limit, num_experts) for limit in limits]
    if not limits or min(limits) < 1 or sum(limits) < num_experts:
        return None
    wanted = min(num_experts + redundant_experts, sum(limits))
    size = next(
        n for n in range(-(-wanted // len(limits)), num_experts + 1) if sum(min(n, m) for m in limits) >= wanted
    )
    return tuple(min(size, limit) for limit in limits)


def tiered_slots_of(limits: Sequence[int], num_experts: int) -> tuple[int, ...] | None:
    """Slots of each worker per layer, where all devices together cannot hold every expert and the rest lies on disk.

    limits: experts per layer that each device holds. What is beyond is shared out evenly. None where a device holds
    less than one expert per layer.
    """
    if not limits or min(limits) < 1:
        return None
    more = max(0, -(-(num_experts - sum(limits)) // len(limits)))
    return tuple(min(num_experts, limit + more) for limit in limits)


def adapt(
    workers: Sequence[Worker],
    has: Mapping[WorkerId, BoolArray],
    load: npt.NDArray[np.int64],
    served: Mapping[WorkerId, BoolArray] | None = None,
) -> Placement:
    """A placement for `workers` that keeps the experts that they have, as far as slots allow.

    In each layer, a worker that has more experts than slots gives up replicas first. Then experts that no worker keeps
    are placed, the heaviest first, on the worker with the least load that has a free slot, and, when all slots are
    full, in the place of replicas. So few bytes are brought, and it takes no time; a planner may find a better
    placement later. A worker's experts lie in its slots in order.

    load: [L, E] tokens per expert, zeros where unknown. served: [L, E] per worker, what it serves now though it does
    not have it; of what nobody has, it keeps as much as it has slots for. Raises PlacementError where all slots are too
    few. The tiers are DEVICE throughout (cluster/facts/tiering.py).
    """
    # all layers at once: the coordinator's loop waits for it
    slots = np.array([worker.slots for worker in workers])
    kept = np.stack([has[worker.id] for worker in workers])
    copies = kept.sum(axis=0, dtype=np.int32)
    if served is not None:
        _keep_served(kept, copies, [served[worker.id] for worker in workers], slots)
    _give_up_surplus(kept, copies, slots)
    _place_missing(kept, copies, slots, load)
    return Placement(
        num_logical_experts=load.shape[1],
        workers=tuple(workers),
        physical_to_logical_map=_map_of(kept, slots),
    )


def _keep_served(kept: BoolArray, copies: Counts, served: Sequence[BoolArray], slots: npt.NDArray[np.int_]) -> None:
    """Add to `kept` ([W, L, E], with the number of `copies` of each, [L, E]) what a worker only serves and nobody has,
    as far as its slots go."""
    if not (np.logical_or.reduce(served) & (copies == 0)).any():
        return
    for mine, theirs, most in zip(kept, served, slots.tolist(), strict=True):
        extra = theirs & (copies == 0)
        if extra.any():
            extra &= extra.cumsum(axis=1) <= most - mine.sum(axis=1, keepdims=True)
            mine |= extra
            copies += extra


def _give_up_surplus(kept: BoolArray, copies: Counts, slots: npt.NDArray[np.int_]) -> None:
    """Take experts from the workers that have more than slots: those with most copies, the last of equally many."""
    surplus = _held(kept) - slots[:, None]
    for rank in np.flatnonzero((surplus > 0).any(axis=1)).tolist():
        mine = kept[rank]
        layers, experts = entries(mine)
        # by layer, then copies, then number: one key is sorted faster than three
        order = np.argsort(((layers + 1) * (len(slots) + 1) - copies[layers, experts]) * mine.shape[1] - experts)
        layers, experts = layers[order], experts[order]
        gone = _places(layers) < surplus[rank][layers]
        mine[layers[gone], experts[gone]] = False
        copies[layers[gone], experts[gone]] -= 1


def _place_missing(kept: BoolArray, copies: Counts, slots: npt.NDArray[np.int_], load: npt.NDArray[np.int64]) -> None:
    """Give every expert that has no copy to a worker."""
    num_layers, num_experts = load.shape
    # plus one, so that without counts a worker with fewer experts counts as less loaded
    weight = load + 1
    lost_in, lost = entries(copies == 0)
    # in each layer the heaviest first, then by number
    lost = lost[np.lexsort((lost, -weight[lost_in, lost], lost_in))]
    missing = np.bincount(lost_in, minlength=num_layers)
    begin = np.cumsum(missing) - missing
    room = slots[:, None] - _held(kept)
    free = room.sum(axis=0)
    placed = np.minimum(missing, free)
    if placed.any():
        ranks, layers, experts = entries(kept)
        burden = np.bincount(ranks * num_layers + layers, weight[layers, experts], minlength=room.size)
        burden = burden.reshape(room.shape)
        for turn in range(int(placed.max())):
            layers = np.flatnonzero(turn < placed)
            experts = lost[begin[layers] + turn]
            ranks = np.where(room[:, layers] > 0, burden[:, layers], np.inf).argmin(axis=0)
            kept[ranks, layers, experts] = True
            burden[ranks, layers] += weight[layers, experts]
            room[ranks, layers] -= 1
    full = np.flatnonzero(missing > free)
    if not len(full):
        return
    # of each expert all copies but the one of the last worker may go, those of the first workers first
    layers, ranks, experts = entries(np.ascontiguousarray(kept[:, full].transpose(1, 0, 2)))
    last = np.zeros((len(full), num_experts), dtype=np.int64)
    last[layers, experts] = np.arange(len(layers))
    gone = np.flatnonzero(last[layers, experts] != np.arange(len(layers)))
    layers = full[layers[gone]]
    turn_of = _places(layers) + free[layers]
    enough = turn_of < missing[layers]
    gone, layers, turn_of = gone[enough], layers[enough], turn_of[enough]
    kept[ranks[gone], layers, experts[gone]] = False
    kept[ranks[gone], layers, lost[begin[layers] + turn_of]] = True


def _map_of(kept: BoolArray, slots: npt.NDArray[np.int_]) -> npt.NDArray[np.int32]:
    """[L, S] of [W, L, E]."""
    num_layers = kept.shape[1]
    ranks, layers, experts = entries(kept)
    first = np.cumsum(slots) - slots
    table = np.full((num_layers, int(slots.sum())), EMPTY, dtype=np.int32)
    table[layers, first[ranks] + _places(ranks * num_layers + layers)] = experts
    return table


def _places(groups: Indices) -> Indices:
    """[n] the place of each within its group. `groups`: [n], ascending."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def _held(kept: BoolArray) -> Counts:
    """[W, L] the number of experts."""
    counts: Counts = kept.view(np.uint8).sum(axis=2, dtype=np.int32)
    return counts


def choose_transport(infos: Sequence[WorkerInfo], *, shared_gpus: bool = False) -> TransportKind:
    """How the workers of an epoch exchange tokens."""
    if len(infos) == 1:
        return TransportKind.LOCAL
    if all(info.device != "cpu" for info in infos):
        gpus = {(info.node, info.gpu) for info in infos}
        if len(gpus) == 1 and infos[0].gpu is not None:
            return TransportKind.IPC
        # NCCL refuses two ranks on one GPU
        return TransportKind.TCP if shared_gpus else TransportKind.NCCL
    return TransportKind.SHM if len({info.node for info in infos}) == 1 else TransportKind.TCP
