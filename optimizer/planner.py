"""plan() makes a verified and priced placement for a problem, by the planner of a given name, within a deadline."""

from __future__ import annotations

import time
from importlib import import_module

import numpy as np

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.lines import meant
from elastic_moe.optimizer.auto import auto_plan
from elastic_moe.optimizer.baselines.heuristics import greedy_table
from elastic_moe.optimizer.baselines.pinning import pinning_plan
from elastic_moe.optimizer.baselines.quick import QUICK_PLANNERS, QuickPlanner
from elastic_moe.optimizer.core.bounds import lower_bound
from elastic_moe.optimizer.core.contract import Budget, Clock, Draft, Planner
from elastic_moe.optimizer.core.cost import Cost, load_imbalance, moves_to, price, shares, step_on_each
from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem
from elastic_moe.optimizer.core.result import PlanResult, SolutionStatus, Termination
from elastic_moe.optimizer.core.solvers import SOLVERS, SolverError
from elastic_moe.optimizer.core.table import to_placement
from elastic_moe.optimizer.relief import relief_plan
from elastic_moe.optimizer.search.local_search import local_search_plan

LEAD = 0.1
"""Share of the deadline by which every other planner ends before `auto`, which does the same steps and must get at
least as far."""

LEAST_LEAD_S = 0.1
"""Least lead in seconds, up to half of a deadline: a busy machine delays a planner by a time that does not shrink with
the deadline."""

OPTIMAL_GAP = 1e-6
"""Relative gap below which a placement counts as proven optimal."""


def _in_budget(quick: QuickPlanner) -> Planner:
    def planner(problem: PlacementProblem, budget: Budget) -> Draft:
        return Draft(table=quick.make_table(problem, budget.rng), reason=quick.reason)

    return planner


def _formulation(module: str, function: str) -> Planner:
    """A planner whose module is imported when it first runs, because Pyomo takes as long to import as a small plan."""

    def planner(problem: PlacementProblem, budget: Budget) -> Draft:
        draft: Draft = getattr(import_module(module), function)(problem, budget)
        return draft

    return planner


_PLANNERS: dict[str, Planner] = {
    **{name: _in_budget(quick) for name, quick in QUICK_PLANNERS.items()},
    "pinning": pinning_plan,
    "load_ilp": _formulation("elastic_moe.optimizer.baselines.load_planner", "load_ilp_plan"),
    "moetuner": _formulation("elastic_moe.optimizer.baselines.moetuner", "moetuner_plan"),
    "relief": relief_plan,
    "local_search": local_search_plan,
    "ilp": _formulation("elastic_moe.optimizer.ilp.planner", "ilp_plan"),
    "auto": auto_plan,
}

PLANNERS: tuple[str, ...] = tuple(_PLANNERS)


def check_planner(name: str) -> None:
    """Raises ConfigError for the name of no planner."""
    if name not in _PLANNERS:
        raise ConfigError(f"planner: expected one of {', '.join(PLANNERS)}, got {name!r}{meant(name, PLANNERS)}")


def plan(
    problem: PlacementProblem,
    deadline_s: float = 10.0,
    *,
    planner: str = "auto",
    solver: str = "highs",
    seed: int = 0,
    clock: Clock = time.monotonic,
) -> PlanResult:
    """The placement that `planner` (one of PLANNERS) finds within about `deadline_s` seconds. Blocks that long.

    Only `auto` keeps to the problem's move_budget; the others show what is possible without it. `clock` returns
    seconds.

    Where a solver is missing, refuses the model or breaks, greedy's placement is returned and the reason says why.
    Raises ConfigError for an unknown planner or solver, and for an invalid deadline or seed.
    """
    check_planner(planner)
    if solver not in SOLVERS:
        raise ConfigError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    if not deadline_s > 0:
        raise ConfigError(f"deadline: expected a positive number of seconds, got {deadline_s!r}")
    if seed < 0:
        raise ConfigError(f"seed: expected at least 0, got {seed}")
    begun = clock()
    bound = lower_bound(problem)
    lead_s = 0.0 if planner == "auto" else min(max(LEAD * deadline_s, LEAST_LEAD_S), deadline_s / 2)
    ends = begun + deadline_s - lead_s
    budget = Budget(ends=ends, solver=solver, rng=np.random.default_rng(seed), clock=clock)
    status = SolutionStatus.FEASIBLE
    try:
        draft = _PLANNERS[planner](problem, budget)
    except SolverError as error:
        draft = _fallback(problem, budget, str(error))
        status = SolutionStatus.FALLBACK
    return _result(problem, draft, planner, status, bound, clock() - begun)


def _fallback(problem: PlacementProblem, budget: Budget, why: str) -> Draft:
    return Draft(
        table=greedy_table(problem, budget.rng),
        planner="greedy",
        reason=f"greedy instead: {why}",
        termination=Termination.SOLVER_FAILED,
    )


def _result(
    problem: PlacementProblem, draft: Draft, planner: str, status: SolutionStatus, bound: float, seconds: float
) -> PlanResult:
    placement = to_placement(problem, draft.table, draft.levels, pin_all=draft.pin_all)
    table = placement.physical_to_logical_map
    cost = price(problem, placement)
    bound = min(max(draft.bound, bound), cost.total_s)
    gap = 1 - bound / cost.total_s
    if status is SolutionStatus.FEASIBLE and gap <= OPTIMAL_GAP:
        status = SolutionStatus.OPTIMAL
    cost_before, imbalance_before = _before(problem)
    moves = moves_to(problem, placement)
    return PlanResult(
        planner=draft.planner or planner,
        placement=placement,
        status=status,
        termination=draft.termination,
        cost_before=cost_before,
        cost=cost,
        each_before=(
            ()
            if cost_before is None or problem.current is None
            else step_on_each(problem, problem.current, cost_before)
        ),
        each=step_on_each(problem, placement, cost),
        imbalance_before=imbalance_before,
        imbalance=mean_imbalance(problem, table),
        lower_bound=bound,
        gap=gap,
        seconds=seconds,
        moves=moves,
        bytes=moves * problem.expert_bytes,
        reason=draft.reason,
    )


def mean_imbalance(problem: PlacementProblem, table: IntArray) -> float:
    """Mean over layers of the slowest worker's load divided by its load under an even split."""
    return float(load_imbalance(problem, shares(problem, table)).mean())


def _before(problem: PlacementProblem) -> tuple[Cost | None, float | None]:
    current = problem.current
    if current is None or current.workers != problem.workers:
        return None, None
    return price(problem, current), mean_imbalance(problem, current.physical_to_logical_map)
