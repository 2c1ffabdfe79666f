"""The planner `auto`: it finds the best plan that the deadline allows, and is no worse than any other planner.

It does the steps of `local_search` and then of `ilp`, which begins with the same steps, with the same random numbers
and more time than they get (optimizer/planner.py). Then it shakes further layers, and answers with the cheapest table
of that search, of the quick planners, and of the current placement. A deadline only cuts the steps short, so the
planner with more time is not behind.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np

from elastic_moe.optimizer.baselines.quick import QUICK_PLANNERS
from elastic_moe.optimizer.core.contract import Budget, Draft
from elastic_moe.optimizer.core.cost import copies, price_table, shares
from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem
from elastic_moe.optimizer.core.result import Termination
from elastic_moe.optimizer.core.solvers import SolverError
from elastic_moe.optimizer.core.tiering import LevelArray, placed_by
from elastic_moe.optimizer.drift import within_budget
from elastic_moe.optimizer.relief import relief_plan
from elastic_moe.optimizer.search.local_search import JointSearch, local_search_plan

UNLIMITED = 10**9

SEARCH = 0.97
"""Share of the time that the search may take. The quick planners need the rest: for 58 layers of 256 experts, more than
a second."""


def auto_plan(problem: PlacementProblem, budget: Budget) -> Draft:
    """Plan within the budget. Without a solver, it does what needs none and the reason says so; it never raises
    SolverError."""
    if problem.move_budget is not None and problem.current is not None:
        return within_budget(problem, budget)
    fresh = copy.deepcopy(budget.rng)
    draft = _searched(problem, budget.share(SEARCH))
    best_s = price_table(problem, draft.table, draft.levels).total_s
    # they come last: before the search they would take more of a short deadline than the lead of `auto`
    for name, table in _quick_tables(problem, budget, fresh).items():
        levels = _present_levels(problem) if name == "current" else None
        cost_s = price_table(problem, table, levels).total_s
        if cost_s < best_s * (1 - 1e-12):
            best_s = cost_s
            draft = dataclasses.replace(
                draft, table=table, levels=levels, planner=name, reason=f"{name} is the cheapest"
            )
    return draft


def _present_levels(problem: PlacementProblem) -> LevelArray | None:
    """The tiers of the current placement; None where every expert fits."""
    if problem.tiering is None or problem.current is None:
        return None
    x = shares(problem, problem.current.physical_to_logical_map)
    return problem.tiering.levels(x, placed_by(problem, problem.current))


def _searched(problem: PlacementProblem, budget: Budget) -> Draft:
    searched = draft = local_search_plan(problem, budget)
    note = ""
    if budget.left_s > 0:
        # this imports Pyomo, which takes longer to load than a short deadline allows
        from elastic_moe.optimizer.ilp.planner import improved

        try:
            draft = improved(problem, draft, budget)
        except SolverError as error:
            note = f"; no ILP: {error}"
    helped = draft.bound > searched.bound or not np.array_equal(draft.table, searched.table)
    planner = "ilp" if helped else "local_search"
    price_s = price_table(problem, draft.table, draft.levels).total_s
    if draft.bound >= price_s * (1 - 1e-6) or budget.left_s <= 0:
        return dataclasses.replace(draft, planner=planner, reason=draft.reason + note)
    search = JointSearch(problem, draft.table)
    tried, kept = search.shake(budget, UNLIMITED)
    if draft.levels is not None and search.total_s >= price_s:
        # the integer program may have chosen better tiers for its table than the search does
        return dataclasses.replace(draft, planner=planner, reason=draft.reason + note)
    return Draft(
        table=search.table,
        planner=planner,
        reason=f"{draft.reason}; {kept} of {tried} further shakes kept{note}",
        termination=Termination.DEADLINE,
        bound=draft.bound,
    )


def _quick_tables(problem: PlacementProblem, budget: Budget, rng: np.random.Generator) -> dict[str, IntArray]:
    # a copy of the random numbers for each, so that each makes the table that the planner of its name makes
    tables = {name: quick.make_table(problem, copy.deepcopy(rng)) for name, quick in QUICK_PLANNERS.items()}
    # its few swaps take milliseconds, whatever the deadline
    tables["relief"] = relief_plan(problem, dataclasses.replace(budget, ends=math.inf)).table
    current = problem.current
    if current is not None and current.workers == problem.workers:
        tables["current"] = current.physical_to_logical_map
        assert problem.tiering is not None or copies(problem, tables["current"]) == 0
    return tables
