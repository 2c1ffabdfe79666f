"""`auto` is never worse than any other planner, whatever the problem and the deadline.

Time is counted in steps of the planners, since a machine gives two of them unequal shares of a second.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.optimizer import PLANNERS, plan
from elastic_moe.optimizer import auto as auto_planner
from elastic_moe.optimizer.baselines.heuristics import random_table
from elastic_moe.optimizer.core.contract import Budget
from elastic_moe.optimizer.core.cost import price_table
from elastic_moe.optimizer.core.problem import PlacementProblem, Semantics
from elastic_moe.optimizer.core.solvers import SolverError
from elastic_moe.optimizer.core.table import to_placement
from elastic_moe.optimizer.ilp import planner as ilp_planner
from elastic_moe.optimizer.search.local_search import local_search_plan
from elastic_moe.optimizer.study.generate import generate_trace
from elastic_moe.optimizer.study.scenario import make_workers, problem_from_trace
from tests.optimizer.cases import tiny

SOLVED = ("load_ilp", "moetuner")
"""Planners whose work a solver does, which takes no steps."""


class Steps:
    """A clock that advances by a millisecond whenever somebody reads it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


@st.composite
def problems(draw: st.DrawFn) -> PlacementProblem:
    experts, width = draw(st.integers(3, 10)), draw(st.integers(1, 6))
    seed, top_k = draw(st.integers(0, 10**6)), draw(st.integers(1, 3))
    trace = generate_trace(
        num_layers=draw(st.integers(1, 3)),
        num_experts=experts,
        top_k=top_k,
        num_tokens=draw(st.integers(30, 600)),
        tokens_per_request=40,
        num_themes=6,
        task_seed=seed,
    )
    nodes, redundant = draw(st.integers(1, min(width, 3))), draw(st.sampled_from([0, 0, 1, 4]))
    rng = np.random.default_rng(seed)
    problem = problem_from_trace(
        trace,
        make_workers(width, nodes=nodes, num_experts=experts, redundant=min(redundant, (width - 1) * experts)),
        semantics=draw(st.sampled_from(Semantics)),
        speeds=tuple(rng.uniform(0.5, 2.0, width)) if draw(st.booleans()) else (),
    )
    changes: dict[str, object] = {"affinity": draw(st.sampled_from([0.0, problem.affinity]))}
    if draw(st.booleans()):
        changes |= {"transitions": None, "coactivation": None, "load_covariance": None}
    if draw(st.booleans()):
        old = to_placement(problem, random_table(problem, rng))
        changes |= {"current": old, "expert_bytes": draw(st.sampled_from([10**4, 10**6, 10**8]))}
    return dataclasses.replace(problem, **changes)


@settings(max_examples=40, deadline=None)
@given(problem=problems(), deadline_s=st.sampled_from([0.005, 0.03, 0.1, 0.2]))
def test_auto_is_never_worse_than_any_other_planner(problem: PlacementProblem, deadline_s: float) -> None:
    auto = plan(problem, deadline_s=deadline_s, clock=Steps())
    for planner in set(PLANNERS) - {"auto", *SOLVED}:
        other = plan(problem, planner=planner, deadline_s=deadline_s, clock=Steps())
        assert auto.cost.total_s <= other.cost.total_s * (1 + 1e-9), planner


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    semantics=st.sampled_from(Semantics),
    experts=st.sampled_from([3, 4]),
    affinity=st.sampled_from([0.0, 2.5]),
)
def test_auto_is_never_worse_than_what_solvers_balance_or_map(
    seed: int, semantics: Semantics, experts: int, affinity: float
) -> None:
    """Solvers take no steps, so the clock is real; `auto` returns as soon as its ILP has proven the optimum. Three
    experts leave a slot for a replica."""
    problem = tiny(seed, experts=experts, slots=(2, 2), semantics=semantics, affinity=affinity)
    auto = plan(problem, deadline_s=20.0)
    for planner in SOLVED:
        other = plan(problem, planner=planner, deadline_s=1.0)
        assert auto.cost.total_s <= other.cost.total_s * (1 + 1e-6), planner


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_more_time_is_never_worse(problem: PlacementProblem) -> None:
    costs = []
    for seconds in (0.001, 0.02, 0.03, 0.05, 0.1, 0.2):
        budget = Budget(ends=seconds, solver="highs", rng=np.random.default_rng(0), clock=Steps())
        costs.append(price_table(problem, local_search_plan(problem, budget).table).total_s)
    assert costs == sorted(costs, reverse=True)


@pytest.mark.slow
def test_auto_is_not_behind_the_local_search_where_there_is_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise SolverError("none here")

    monkeypatch.setattr(ilp_planner, "solve", missing)
    problem = generated()
    auto = plan(problem, deadline_s=3.0, clock=Steps())
    alone = plan(problem, planner="local_search", deadline_s=3.0, clock=Steps())
    assert "none here" in auto.reason
    assert auto.cost.total_s <= alone.cost.total_s


def test_quick_planners_take_no_time_from_the_search_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Steps()

    def slow(*_: object) -> Mapping[str, np.ndarray]:
        clock.now += 1.0
        return {}

    monkeypatch.setattr(auto_planner, "_quick_tables", slow)
    # a solver's time would not be that of the clock
    monkeypatch.setattr("elastic_moe.optimizer.ilp.planner.improved", lambda _, draft, budget: draft)
    result = plan(generated(), deadline_s=1.0, clock=clock)
    assert "0 of 0 shaken" not in result.reason
    assert result.planner == "local_search", "an integer program that changes nothing has not made the table"


def generated() -> PlacementProblem:
    trace = generate_trace(num_layers=4, num_experts=16, top_k=2, num_tokens=600, num_themes=8)
    return problem_from_trace(trace, make_workers(4, nodes=1, num_experts=16))
