"""The planner `load_ilp`: it solves the min-max load ILP of every layer, from greedy's table and with its replicas."""

from __future__ import annotations

import numpy as np

from elastic_moe.optimizer.baselines.heuristics import greedy_table
from elastic_moe.optimizer.baselines.load_ilp import build_load_model, chosen_workers, start_from
from elastic_moe.optimizer.core.contract import Budget, Draft, Pace
from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem
from elastic_moe.optimizer.core.result import Termination
from elastic_moe.optimizer.core.solvers import solve
from elastic_moe.optimizer.core.table import room, row_of

LOAD_GAP = 5e-3
"""Relative gap at which a layer's balance is good enough: loads change by more than that between two windows."""


def load_ilp_plan(problem: PlacementProblem, budget: Budget) -> Draft:
    """The best-balanced placement, layer by layer. A layer for which no time is left keeps greedy's slots.

    Raises SolverError where the solver cannot be used.
    """
    table = greedy_table(problem, budget.rng)
    proven, pace = 0, Pace(clock=budget.clock)
    size = problem.num_slots * len(problem.workers)
    for layer in range(problem.num_layers):
        if not pace.allows(2 * size, budget.left_s):
            break
        table[layer], optimal = _balanced_row(problem, layer, table[layer], budget, pace)
        proven += optimal
    reason = f"{proven} of {problem.num_layers} layers balanced within {LOAD_GAP:.1%} of the optimum"
    done = proven == problem.num_layers
    return Draft(table=table, reason=reason, termination=Termination.COMPLETED if done else Termination.DEADLINE)


def _balanced_row(
    problem: PlacementProblem, layer: int, row: IntArray, budget: Budget, pace: Pace
) -> tuple[IntArray, bool]:
    """([S] slots, proven) of one layer, for the experts and replicas that `row` holds."""
    slots = np.flatnonzero(row >= 0)
    experts = row[slots]
    replicas = np.bincount(experts, minlength=problem.num_experts)
    weights = problem.loads[layer, experts] / replicas[experts]
    with pace.timed(problem.num_slots * len(problem.workers)):
        model = build_load_model(weights, problem.speed, room(problem), experts)
        load = np.bincount(problem.owner[slots], weights, len(problem.workers))
        start_from(model, problem.owner[slots], float((load / problem.speed).max()))
    limit_s = budget.left_s / (problem.num_layers - layer)
    solution = solve(model, solver=budget.solver, time_limit_s=limit_s, gap=LOAD_GAP)
    if solution.objective is None:
        return row, False
    chosen = chosen_workers(model)
    held = [experts[chosen == rank].tolist() for rank in range(len(problem.workers))]
    return row_of(problem, held), solution.optimal
