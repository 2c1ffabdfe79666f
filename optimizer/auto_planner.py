"""The planner `auto`: the best that the deadline allows.

It runs what `ilp` runs (with the same random numbers), goes on shaking layers while there is time, and answers with
the cheapest of that, of the quick planners and of the current placement: so it is not worse than any of them given
the same time.
"""

from __future__ import annotations

import numpy as np

from optimizer.cost import copies, price_table
from optimizer.draft import Budget, Draft
from optimizer.drift import within_budget
from optimizer.eplb import eplb_table
from optimizer.heuristics import contiguous_table, greedy_table, round_robin_table
from optimizer.ilp_planner import ilp_plan
from optimizer.local_search import JointSearch, local_search_plan
from optimizer.problem import IntArray, PlacementProblem
from optimizer.result import Termination
from optimizer.solvers import SolverError

UNLIMITED = 10**9


def auto_plan(problem: PlacementProblem, budget: Budget) -> Draft:
    """Never raises SolverError: without a solver it does what needs none, and says so."""
    if problem.move_budget is not None and problem.current is not None:
        return within_budget(problem, budget)
    draft = _searched(problem, budget)
    best_s = price_table(problem, draft.table).total_s
    for name, table in _quick_tables(problem, budget.rng).items():
        cost_s = price_table(problem, table).total_s
        if cost_s < best_s * (1 - 1e-12):
            best_s, draft = (
                cost_s,
                Draft(table=table, planner=name, reason=f"{name} is the cheapest", bound=draft.bound),
            )
    return draft


def _searched(problem: PlacementProblem, budget: Budget) -> Draft:
    try:
        draft, planner, note = ilp_plan(problem, budget.share(0.97)), "ilp", ""
    except SolverError as error:
        draft, planner, note = local_search_plan(problem, budget), "local_search", f"; no ILP: {error}"
    price_s = price_table(problem, draft.table).total_s
    if draft.bound >= price_s * (1 - 1e-6):
        return Draft(table=draft.table, planner=planner, reason=draft.reason, bound=draft.bound)
    search = JointSearch(problem, draft.table)
    tried, kept = search.shake(budget, UNLIMITED)
    return Draft(
        table=search.table,
        planner=planner,
        reason=f"{draft.reason}; {kept} of {tried} further shakes kept{note}",
        termination=Termination.DEADLINE,
        bound=draft.bound,
    )


def _quick_tables(problem: PlacementProblem, rng: np.random.Generator) -> dict[str, IntArray]:
    tables = {
        "contiguous": contiguous_table(problem, rng),
        "round_robin": round_robin_table(problem, rng),
        "greedy": greedy_table(problem, rng),
        "eplb": eplb_table(problem, rng),
    }
    current = problem.current
    if current is not None and current.workers == problem.workers:
        tables["current"] = current.physical_to_logical_map
        assert copies(problem, tables["current"]) == 0
    return tables
