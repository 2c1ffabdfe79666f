"""The planner `pinning`: what others do where experts do not all fit.

Experts are placed by load alone, as by `greedy`, and each worker pins those that are chosen most often, the same number
in every layer. Where every expert fits, the plan is greedy's.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.cluster.placement import EMPTY, Tier
from elastic_moe.optimizer.baselines.heuristics import greedy_table
from elastic_moe.optimizer.core.contract import Budget, Draft
from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem
from elastic_moe.optimizer.core.tiering import NOT_HELD, LevelArray

REASON = "heaviest expert first; each worker pins the experts that are chosen most often"


def pinning_plan(problem: PlacementProblem, budget: Budget) -> Draft:
    """Greedy's table, with tiers by frequency."""
    table = greedy_table(problem, budget.rng)
    if problem.tiering is None:
        return Draft(table=table, reason=REASON)
    return Draft(table=table, levels=_by_frequency(problem, table), pin_all=True, reason=REASON)


def _by_frequency(problem: PlacementProblem, table: IntArray) -> LevelArray:
    found = np.full((*problem.loads.shape, len(problem.workers)), NOT_HELD, dtype=np.int8)
    for rank, memory in enumerate(problem.memory):
        room, host = memory.device_experts // problem.num_layers, memory.host_experts // problem.num_layers
        for layer, row in enumerate(table[:, problem.owner == rank]):
            held = row[row != EMPTY]
            ordered = held[np.argsort(-problem.loads[layer, held], kind="stable")]
            inside = len(held) if len(held) <= room else room - 1
            found[layer, ordered, rank] = Tier.DISK
            found[layer, ordered[: inside + host], rank] = Tier.HOST
            found[layer, ordered[:inside], rank] = Tier.DEVICE
    return found
