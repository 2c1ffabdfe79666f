"""The planner `ilp`, our own. It starts from the local search.

A small problem is solved exactly: the joint model is solved again, with tangents added at each incumbent, until the
model and the true cost agree, which is a proof. A large problem is decomposed: layer by layer, an ILP deals the
contents of a few workers again while the rest stays (a large neighbourhood, which swaps cannot search), and the result
is kept where the true cost fell. The bound is then that of optimizer.core.bounds.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from elastic_moe.cluster.lines import counted
from elastic_moe.optimizer.core.bounds import lower_bound
from elastic_moe.optimizer.core.contract import Budget, Draft
from elastic_moe.optimizer.core.cost import price_table, shares, worker_loads
from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem, Semantics
from elastic_moe.optimizer.core.result import Termination
from elastic_moe.optimizer.core.solvers import solve
from elastic_moe.optimizer.ilp import joint as joint_ilp
from elastic_moe.optimizer.ilp import joint_sets
from elastic_moe.optimizer.ilp.layer import LayerModel
from elastic_moe.optimizer.search.local_search import JointSearch, local_search_plan

SMALL = 6000
"""Most products of two variables with which the joint model is tried."""

PROVEN = 1e-7
"""Relative gap at which the model and the true cost count as equal."""

PIECE = 22
"""Most experts that one piece of the decomposition deals again; its products grow with the square."""

PIECE_S = 2.0
"""Seconds after which a piece is given up."""


def ilp_plan(problem: PlacementProblem, budget: Budget) -> Draft:
    """Search locally, then improve by ILPs. Raises SolverError where the solver cannot be used."""
    return improved(problem, local_search_plan(problem, budget), budget)


def improved(problem: PlacementProblem, seed: Draft, budget: Budget) -> Draft:
    """Improve `seed` by ILPs; the result is never worse. Raises SolverError where the solver cannot be used."""
    if joint_sets.size(problem) <= SMALL and budget.left_s > 0:
        return _exact(problem, seed.table, budget)
    if seed.termination is Termination.DEADLINE:
        return dataclasses.replace(seed, reason=f"{seed.reason}; no time for ILPs")
    return piecewise(problem, seed.table, budget)


def _exact(problem: PlacementProblem, start: IntArray, budget: Budget) -> Draft:
    best, best_s = start, price_table(problem, start).total_s
    levels = None if problem.tiering is None else problem.tiering.levels(shares(problem, start))
    joint = joint_ilp.JointModel(problem)
    bound, rounds = lower_bound(problem), 0
    while budget.left_s > 0 and bound < best_s * (1 - PROVEN):
        joint.start_from(best, levels)
        solution = solve(joint.model, solver=budget.solver, time_limit_s=budget.left_s, gap=PROVEN / 4)
        before, bound = bound, max(bound, solution.bound * 1e-6)
        rounds += 1
        if solution.objective is None:
            break
        table = joint.table()
        found_s = price_table(problem, table, joint.levels()).total_s
        inexact = problem.scenario_loads is not None or problem.shares_cores
        if inexact and found_s >= best_s and bound <= before * (1 + PROVEN):
            # the model knows the mean loads and the slowest worker only, so it need not meet the true cost
            break
        if found_s < best_s:
            best, best_s, levels = table, found_s, joint.levels()
        if not _add_tangents(problem, joint, table) and not solution.optimal:
            break
    proven = bound >= best_s * (1 - 10 * PROVEN)
    how = "to proof" if proven else "until the deadline" if budget.left_s <= 0 else "for the mean loads' slowest worker"
    return Draft(
        table=best,
        levels=levels,
        reason=f"one joint model, solved {counted(rounds, 'time')} {how}",
        termination=Termination.COMPLETED if proven else Termination.DEADLINE,
        bound=bound,
    )


def _add_tangents(problem: PlacementProblem, joint: joint_ilp.JointModel, table: IntArray) -> bool:
    """Add tangents to the model's arrivals at the slopes of a table. Returns whether any were added."""
    if problem.semantics is not Semantics.HOME or len(problem.workers) == 1:
        return False
    for layer, slopes in enumerate(joint_sets.arrival_slopes(problem, shares(problem, table))):
        for rank, slope in enumerate(slopes):
            joint.add_tangent(layer, rank, float(slope))
    return True


def piecewise(problem: PlacementProblem, start: IntArray, budget: Budget) -> Draft:
    """Pass over the layers; each is dealt again in pieces until a piece gains nothing."""
    search = JointSearch(problem, start)
    tried = kept = 0
    for layer in _layers_by_need(problem, search.table):
        better = True
        while better and budget.left_s > 0.1:
            better = _improve(problem, search, layer, budget)
            tried, kept = tried + 1, kept + better
    return Draft(
        table=search.table,
        reason=f"local search, then {kept} of {tried} pieces of a layer improved by ILP",
        termination=Termination.DEADLINE if budget.left_s <= 0.1 else Termination.COMPLETED,
    )


def _layers_by_need(problem: PlacementProblem, table: IntArray) -> list[int]:
    """All layers; those that can gain most seconds by balance come first."""
    busy = worker_loads(problem, shares(problem, table)) / problem.speed
    excess = busy.max(axis=1) / (problem.loads.sum(axis=1) / problem.speed.sum())
    return [int(layer) for layer in np.argsort(-excess)]


def _improve(problem: PlacementProblem, search: JointSearch, layer: int, budget: Budget) -> bool:
    """Deal the contents of the busiest, the idlest and random workers again. Keep a better result; return whether it
    is."""
    terms = search.pricer.terms(layer, 7, 4)
    row, before = search.table[layer].copy(), search.pricer.around_s(layer)
    model = LayerModel(terms, row, _piece(problem, search, layer, budget.rng))
    limit_s = min(PIECE_S, budget.left_s)
    solution = solve(model.model, solver=budget.solver, time_limit_s=limit_s, gap=1e-4)
    # a piece that the deadline has cut short would differ with more time, and is not kept
    if solution.objective is None or (limit_s < PIECE_S and not solution.optimal):
        return False
    search.table[layer] = model.chosen_row()
    search.pricer.update(search.table, layer)
    if search.pricer.around_s(layer) < before * (1 - 1e-9):
        return True
    search.table[layer] = row
    search.pricer.update(search.table, layer)
    return False


def _piece(problem: PlacementProblem, search: JointSearch, layer: int, rng: np.random.Generator) -> list[int]:
    """Ranks of the workers of a piece: at least two, and as many as hold PIECE experts together."""
    busy = (problem.loads[layer] @ search.pricer.x[layer]) / problem.speed
    held = (search.pricer.x[layer] > 0).sum(axis=0)
    first, last = int(busy.argmax()), int(busy.argmin())
    ranks = [first, last] if first != last else [first]
    for rank in rng.permutation(len(busy)):
        if rank not in ranks and (held[ranks].sum() + held[rank] <= PIECE or len(ranks) < 2):
            ranks.append(int(rank))
    return sorted(ranks)
