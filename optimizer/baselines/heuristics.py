"""Simple planners that look at load only, or at nothing. They are baselines, seeds of searches, and the fallback.

Each takes a problem (and a random generator) and returns a slot table [L, S].
"""

from __future__ import annotations

import numpy as np

from elastic_moe.cluster.placement import contiguous
from elastic_moe.optimizer.baselines.replicas import replica_counts
from elastic_moe.optimizer.core.problem import FloatArray, IntArray, PlacementProblem
from elastic_moe.optimizer.core.table import room, row_of


def contiguous_table(problem: PlacementProblem, rng: np.random.Generator) -> IntArray:
    """Experts in order, as evenly as slots allow, as engines place them at their start."""
    return contiguous(problem.num_layers, problem.num_experts, problem.workers).physical_to_logical_map.copy()


def round_robin_table(problem: PlacementProblem, rng: np.random.Generator) -> IntArray:
    """Expert e goes to worker e mod W; full workers are passed over."""
    return _dealt(problem, np.arange(problem.num_experts))


def random_table(problem: PlacementProblem, rng: np.random.Generator) -> IntArray:
    """The experts of every layer are dealt in a random order of their own."""
    return np.concatenate(
        [_dealt(problem, rng.permutation(problem.num_experts))[:1] for _ in range(problem.num_layers)]
    )


def _dealt(problem: PlacementProblem, order: np.ndarray) -> IntArray:
    held: list[list[int]] = [[] for _ in problem.workers]
    rank = 0
    for expert in order:
        while len(held[rank]) >= problem.workers[rank].slots:
            rank = (rank + 1) % len(held)
        held[rank].append(int(expert))
        rank = (rank + 1) % len(held)
    return np.tile(row_of(problem, held), (problem.num_layers, 1))


def greedy_table(problem: PlacementProblem, rng: np.random.Generator) -> IntArray:
    """Longest processing time first: the heaviest expert goes to the worker with a free slot that would end earliest.

    Source: Huang et al. 2023, "Towards MoE Deployment", section VII, after Graham 1969. Spare slots get replicas of
    the experts that are heaviest per replica.
    """
    return np.stack([_replicated_row(problem, layer) for layer in range(problem.num_layers)])


def pack_layer(problem: PlacementProblem, layer: int) -> IntArray:
    """[E] worker of each expert of one layer, without replicas. The heaviest expert comes first, and goes to the worker
    that would end earliest."""
    held = _pack(problem, problem.loads[layer], np.ones(problem.num_experts, dtype=np.int32))
    assert held is not None
    worker_of = np.empty(problem.num_experts, dtype=np.int32)
    for rank, experts in enumerate(held):
        worker_of[experts] = rank
    return worker_of


def _replicated_row(problem: PlacementProblem, layer: int) -> IntArray:
    """[S] slots of one layer: each replica, heaviest first, goes to the worker that would end earliest.

    No replicas are used where they do harm, since a slow worker gets an even share of a replicated expert too.
    """
    replicated = _with_replicas(problem, layer)
    if len(set(problem.speed)) == 1 or (replicated >= 0).sum() == problem.num_experts:
        return replicated
    plain = _unreplicated_row(problem, layer)
    return min(replicated, plain, key=lambda row: _end_of(problem, layer, row))


def unreplicated_table(problem: PlacementProblem) -> IntArray:
    """Longest processing time first, and spare slots stay empty."""
    return np.stack([_unreplicated_row(problem, layer) for layer in range(problem.num_layers)])


def _unreplicated_row(problem: PlacementProblem, layer: int) -> IntArray:
    worker_of = pack_layer(problem, layer)
    return row_of(problem, [np.flatnonzero(worker_of == rank).tolist() for rank in range(len(problem.workers))])


def _end_of(problem: PlacementProblem, layer: int, row: IntArray) -> float:
    """Load divided by speed of the slowest worker."""
    held = row >= 0
    share = problem.loads[layer] / np.maximum(np.bincount(row[held], minlength=problem.num_experts), 1)
    load = np.bincount(problem.owner[held], share[row[held]], len(problem.workers))
    return float((load / problem.speed).max())


def _with_replicas(problem: PlacementProblem, layer: int) -> IntArray:
    replicas = replica_counts(problem.loads[layer], sum(room(problem)), len(problem.workers))
    for spare in range(int(replicas.sum()) - problem.num_experts, -1, -1):
        held = _pack(problem, problem.loads[layer], replicas)
        if held is not None:
            return row_of(problem, held)
        # replicas of one expert need different workers; where the last slots do not allow that, one replica is dropped
        assert spare
        replicas[int(np.argmin(np.where(replicas > 1, problem.loads[layer] / replicas, np.inf)))] -= 1
    raise AssertionError("experts without replicas always fit")


def _pack(problem: PlacementProblem, load: FloatArray, replicas: IntArray) -> list[list[int]] | None:
    items = np.repeat(np.arange(problem.num_experts), replicas)
    weight = (load / replicas)[items]
    free, busy = np.array(room(problem)), np.zeros(len(problem.workers))
    held: list[list[int]] = [[] for _ in problem.workers]
    # the replicas of an expert are adjacent in this order, so that each still finds a worker of its own
    for item in np.lexsort((items, -weight)):
        expert = int(items[item])
        barred = (free == 0) | np.array([expert in mine for mine in held])
        if barred.all():
            return None
        ends = np.where(barred, np.inf, (busy + weight[item]) / problem.speed)
        rank = int(np.argmin(ends))
        held[rank].append(expert)
        free[rank] -= 1
        busy[rank] += weight[item]
    return held


def anticorrelation_table(problem: PlacementProblem, rng: np.random.Generator) -> IntArray:
    """Greedy by load; experts that are active together are kept apart, so that their peaks do not meet on one worker.

    Source: Huang et al. 2023, "Towards MoE Deployment", section VII-B: an expert goes to the worker with
    the least load plus (here, in tokens) co-activation with what the worker already holds.
    """
    rows = []
    for layer in range(problem.num_layers):
        free, busy = np.array(room(problem)), np.zeros(len(problem.workers))
        held: list[list[int]] = [[] for _ in problem.workers]
        holds = np.zeros((problem.num_experts, len(problem.workers)))
        for expert in np.argsort(-problem.loads[layer], kind="stable"):
            together = problem.pairs[layer, expert] @ holds
            ends = (busy + problem.loads[layer, expert] + together) / problem.speed
            rank = int(np.argmin(np.where(free == 0, np.inf, ends)))
            held[rank].append(int(expert))
            holds[expert, rank] = 1.0
            free[rank] -= 1
            busy[rank] += problem.loads[layer, expert] + together[rank]
        rows.append(row_of(problem, held))
    return np.stack(rows)
