"""Placements from the most even load to the most uneven one, to hold the cost model against measured steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elastic_moe.cluster.placement import Placement
from elastic_moe.optimizer.core.problem import FloatArray, IntArray, PlacementProblem
from elastic_moe.optimizer.core.table import row_of, to_placement


def graded(problem: PlacementProblem, parts: Sequence[float], rng: np.random.Generator) -> list[Placement]:
    """A placement without replicas for each of `parts`: with 0 it is even, with 1 the first worker has all experts that
    its slots take, and between them the first worker's load grows evenly. What it leaves is by turns spread over all
    other workers, and put on as few of them as have no more than the first. So placements of about the same busiest
    worker differ in how many others are busy, and in how many workers a token goes to. `rng` breaks ties."""
    placements = []
    for number, part in enumerate(parts):
        wanted = _shares_of_load(len(problem.workers), part, together=number % 2 == 1)
        rows = [_filled(problem, layer, wanted, rng) for layer in range(problem.num_layers)]
        placements.append(to_placement(problem, np.stack(rows)))
    return placements


def _shares_of_load(workers: int, part: float, *, together: bool) -> FloatArray:
    """[W] the share of the load that each worker is to have. `part`: 0 for an even split, 1 for all on the first
    worker. `together`: the rest is on as few others as have no more than the first."""
    first = 1 / workers + part * (1 - 1 / workers)
    if not together:
        return np.array([first, *[(1 - first) / (workers - 1)] * (workers - 1)])
    shares, left = [], 1.0
    for _ in range(workers):
        shares.append(min(first, left))
        left -= shares[-1]
    return np.array(shares)


def _filled(problem: PlacementProblem, layer: int, wanted: FloatArray, rng: np.random.Generator) -> IntArray:
    """[S] the layer's experts, heaviest first, each on the worker with a free slot that lacks most of what it is to
    have."""
    load = problem.loads[layer] / problem.loads[layer].sum()
    held: list[list[int]] = [[] for _ in problem.workers]
    lacks, free = wanted.copy(), np.array([worker.slots for worker in problem.workers])
    for expert in np.lexsort((rng.permutation(len(load)), -load)):
        rank = int(np.argmax(np.where(free > 0, lacks, -np.inf)))
        held[rank].append(int(expert))
        lacks[rank] -= load[expert]
        free[rank] -= 1
    return row_of(problem, held)
