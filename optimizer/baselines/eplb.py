"""DeepSeek's expert-parallel load balancer, written from its description (deepseek-ai/EPLB, README).

It looks at load only, and turns spare slots into replicas. It is hierarchical where the workers are the same, are
spread evenly over nodes, and the experts form groups that nodes can share evenly: groups are packed onto nodes, experts
are replicated within each node, and replicas are packed onto the node's workers. Otherwise it treats all nodes as one.
Packing is balanced: every bin takes the same number of items, heaviest first, each into the lightest bin with room.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.optimizer.baselines.replicas import replica_counts
from elastic_moe.optimizer.core.problem import FloatArray, IntArray, PlacementProblem
from elastic_moe.optimizer.core.table import room, row_of


def eplb_table(problem: PlacementProblem, rng: np.random.Generator, groups: int = 0) -> IntArray:
    """[L, S] slot table. `groups` is the number of the router's expert groups (DeepSeek-V3: 8); 0 takes one per
    node."""
    nodes = int(problem.node_of.max()) + 1
    groups = groups or nodes
    hierarchical = nodes > 1 and groups % nodes == 0 and problem.num_experts % groups == 0 and _alike(problem, nodes)
    pack = _hierarchical_layer if hierarchical else _global_layer
    return np.stack([pack(problem, load, groups) for load in problem.loads])


def _alike(problem: PlacementProblem, nodes: int) -> bool:
    slots = {worker.slots for worker in problem.workers}
    per_node = np.bincount(problem.node_of)
    room_per_node = int(per_node[0]) * min(slots)
    return len(slots) == 1 and len(set(per_node)) == 1 and room_per_node * nodes >= problem.num_experts


def _global_layer(problem: PlacementProblem, load: FloatArray, groups: int) -> IntArray:
    ranks = list(range(len(problem.workers)))
    held = _spread(load, np.arange(problem.num_experts), [room(problem)[rank] for rank in ranks])
    return row_of(problem, held)


def _hierarchical_layer(problem: PlacementProblem, load: FloatArray, groups: int) -> IntArray:
    nodes = int(problem.node_of.max()) + 1
    members = np.arange(problem.num_experts).reshape(groups, -1)
    node_of_group = pack_evenly(load[members].sum(axis=1), [groups // nodes] * nodes)
    held: list[list[int]] = [[] for _ in problem.workers]
    for node in range(nodes):
        ranks = np.flatnonzero(problem.node_of == node)
        experts = members[np.flatnonzero(node_of_group == node)].ravel()
        mine = _spread(load[experts], experts, [room(problem)[rank] for rank in ranks])
        for rank, expert_ids in zip(ranks, mine, strict=True):
            held[rank] = expert_ids
    return row_of(problem, held)


def _spread(load: FloatArray, experts: IntArray | np.ndarray, slots: list[int]) -> list[list[int]]:
    """The experts that each worker gets: replicated, then packed. Two replicas of one expert never share a worker."""
    replicas = replica_counts(load, sum(slots), len(slots))
    while True:
        item = np.repeat(np.arange(len(load)), replicas)
        bins = pack_evenly((load / replicas)[item], slots, item)
        if (bins >= 0).all():
            return [sorted(int(experts[k]) for k in item[bins == rank]) for rank in range(len(slots))]
        # the last free slots are on workers that hold a replica already, so the expert gets one replica fewer
        replicas[item[bins < 0][0]] -= 1


def pack_evenly(weights: FloatArray, room_of: list[int], kind: np.ndarray | None = None) -> IntArray:
    """[I] bin of each item; -1 where no bin is possible. The heaviest item comes first, and goes into the lightest bin
    that has room and holds no item of its kind."""
    weight, left = np.zeros(len(room_of)), np.array(room_of)
    bins = np.full(len(weights), -1, dtype=np.int32)
    inside: list[set[int]] = [set() for _ in room_of]
    for item in np.argsort(-weights, kind="stable"):
        label = int(item if kind is None else kind[item])
        barred = (left == 0) | np.array([label in members for members in inside])
        if barred.all():
            continue
        choice = int(np.argmin(np.where(barred, np.inf, weight)))
        bins[item] = choice
        weight[choice] += weights[item]
        left[choice] -= 1
        inside[choice].add(label)
    return bins
