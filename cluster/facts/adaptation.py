"""What follows from a set of workers: their slots, the placement that moves the fewest experts, and the transport.

Legend: L MoE layers, E logical experts, W workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.facts.membership import BoolArray
from elastic_moe.cluster.messages.epochs import TransportKind, WorkerInfo
from elastic_moe.cluster.placement import EMPTY, Placement, Worker, WorkerId


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
    are placed, the heaviest first, on the worker with the least load that has a free slot. So few bytes are brought,
    and it takes no time; a planner may find a better placement later.

    load: [L, E] tokens per expert, zeros where unknown. served: [L, E] per worker, what it serves now though it does
    not have it; of what nobody has, it keeps as much as it has slots for. Raises PlacementError where all slots are too
    few. The tiers are DEVICE throughout (cluster/facts/tiering.py).
    """
    num_layers, num_experts = load.shape
    rows = []
    for layer in range(num_layers):
        kept = [has[worker.id][layer] for worker in workers]
        if served is not None:
            kept = _keep_served(workers, kept, [served[worker.id][layer] for worker in workers])
        rows.append(_adapt_layer(workers, kept, load[layer]))
    return Placement(
        num_logical_experts=num_experts,
        workers=tuple(workers),
        physical_to_logical_map=np.array(rows, dtype=np.int32).reshape(num_layers, sum(w.slots for w in workers)),
    )


def _keep_served(workers: Sequence[Worker], has: Sequence[BoolArray], served: Sequence[BoolArray]) -> list[BoolArray]:
    """`has`, and those that a worker only serves and nobody has, as far as its slots go."""
    taken = np.any(has, axis=0)
    kept = []
    for worker, mine, theirs in zip(workers, has, served, strict=True):
        extra = np.nonzero(theirs & ~taken)[0][: max(0, worker.slots - int(mine.sum()))]
        taken[extra] = True
        kept.append(mine.copy())
        kept[-1][extra] = True
    return kept


def _adapt_layer(workers: Sequence[Worker], has: Sequence[BoolArray], load: npt.NDArray[np.int64]) -> list[int]:
    kept = [[int(e) for e in np.nonzero(mask)[0]] for mask in has]
    copies = np.sum(has, axis=0)
    for worker, experts in zip(workers, kept, strict=True):
        while len(experts) > worker.slots:
            # of equally many copies the last expert, so that equal inputs give equal placements
            gone = max(experts, key=lambda e: (copies[e], e))
            experts.remove(gone)
            copies[gone] -= 1
    # plus one, so that without counts a worker with fewer experts counts as less loaded
    weight = load + 1
    for expert in sorted(np.nonzero(copies == 0)[0], key=lambda e: (-weight[e], e)):
        if all(len(experts) == worker.slots for worker, experts in zip(workers, kept, strict=True)):
            _evict_replica(kept, copies)
        room = [rank for rank, worker in enumerate(workers) if len(kept[rank]) < worker.slots]
        target = min(room, key=lambda rank: (sum(int(weight[e]) for e in kept[rank]), rank))
        kept[target].append(int(expert))
        copies[expert] += 1
    row: list[int] = []
    for worker, experts in zip(workers, kept, strict=True):
        row += [*experts, *[EMPTY] * (worker.slots - len(experts))]
    return row


def _evict_replica(kept: Sequence[list[int]], copies: npt.NDArray[np.int_]) -> None:
    """Free a slot by dropping a replica. There is one, because all slots are full and an expert has none."""
    for experts in kept:
        for expert in experts:
            if copies[expert] > 1:
                experts.remove(expert)
                copies[expert] -= 1
                return


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
