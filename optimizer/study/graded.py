"""Placements from the most even load to the most uneven one, to hold the cost model against measured steps."""

from __future__ import annotations

import numpy as np

from elastic_moe.cluster.placement import Placement
from elastic_moe.optimizer.baselines.heuristics import greedy_table
from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem
from elastic_moe.optimizer.core.table import row_of, to_placement


def graded(problem: PlacementProblem, number: int, rng: np.random.Generator) -> list[Placement]:
    """`number` placements. The first one is greedy's; in each further one, more layers have their heaviest experts
    together on the first workers; in the last one all have. `rng` chooses the layers."""
    even, uneven = greedy_table(problem, rng), _uneven_table(problem)
    order, layers = rng.permutation(problem.num_layers), problem.num_layers
    placements = []
    for share in np.linspace(0.0, 1.0, number):
        whole, part = divmod(share * layers, 1.0)
        table = even.copy()
        table[order[: int(whole)]] = uneven[order[: int(whole)]]
        if part > 0 and int(whole) < layers:
            layer = order[int(whole)]
            table[layer] = _between(problem, layer, part)
        placements.append(to_placement(problem, table))
    return placements


def _uneven_table(problem: PlacementProblem) -> IntArray:
    """[L, S] the heaviest experts on the first worker, the next ones on the second, and so on; spare slots are
    empty."""
    return np.stack([_filled(problem, np.argsort(-load, kind="stable")) for load in problem.loads])


def _between(problem: PlacementProblem, layer: int, part: float) -> IntArray:
    """[S] the same for the `part` heaviest experts of a layer; the others are dealt in turn from the last worker on."""
    order = np.argsort(-problem.loads[layer], kind="stable")
    together = int(part * len(order))
    return _filled(problem, np.concatenate([order[:together], order[together:][::-1]]))


def _filled(problem: PlacementProblem, order: np.ndarray) -> IntArray:
    held, at = [], 0
    for worker in problem.workers:
        held.append([int(expert) for expert in order[at : at + worker.slots]])
        at += worker.slots
    return row_of(problem, held)
