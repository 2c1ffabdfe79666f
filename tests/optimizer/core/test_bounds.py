"""Lower bounds hold for every placement, and the ILP proves the optimum of tiny problems.

Deadlines count the processor's time: on a busy machine the search before the ILP might use all of it up.
"""

import re
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.placement import contiguous
from elastic_moe.optimizer import SolutionStatus, plan
from elastic_moe.optimizer.baselines.heuristics import random_table
from elastic_moe.optimizer.core.bounds import lower_bound, most_together
from elastic_moe.optimizer.core.cost import price_table
from elastic_moe.optimizer.core.problem import Links, Semantics
from tests.optimizer.cases import every_table, optimum, tiny

SHAPES = [
    {"workers": 2},
    {"workers": 2, "slots": (3, 2)},
    {"workers": 3, "nodes": 3, "slots": (2, 2, 1)},
    {"workers": 3, "layers": 1, "slots": (2, 2, 2)},
    {"workers": 4, "nodes": 2, "slots": (1, 1, 1, 1)},
    {"workers": 2, "experts": 3, "nodes": 2, "slots": (3, 2)},
    {"workers": 3, "nodes": 3, "slots": (2, 2, 1), "links": Links(ports_gbps=(9.0, 1.0, 0.1))},
    {"workers": 2, "scenarios": 4},
    {"workers": 3, "slots": (2, 2, 2), "node_cores": 1.5, "speeds": (1.0, 2.0, 1.0)},
    {"workers": 4, "nodes": 2, "slots": (2, 2, 2, 2), "node_cores": 1.0},
    {"workers": 2, "slots": (3, 2), "nodes": 2, "links": Links(ports_gbps=(900.0, 90.0), uplinks_gbps=(700.0, 2000.0))},
]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES), semantics=st.sampled_from(list(Semantics)))
def test_no_placement_beats_the_bound(seed: int, shape: dict[str, Any], semantics: Semantics) -> None:
    problem = tiny(seed, semantics=semantics, **shape)
    bound = lower_bound(problem)
    rng = np.random.default_rng(seed)
    tables = list(every_table(problem)) if shape["workers"] == 2 else [random_table(problem, rng) for _ in range(50)]
    assert bound <= min(price_table(problem, table).total_s for table in tables) * (1 + 1e-12)


def test_the_eigenvalue_bound_is_met_by_cliques() -> None:
    """Two groups of experts that only ever meet one another: all their pairs can be kept together, and no more."""
    pairs = np.kron(np.eye(2), np.ones((3, 3)) - np.eye(3))
    assert most_together(pairs, np.array([3.0, 3.0]), single=True) == pytest.approx(6.0)


@pytest.mark.parametrize("semantics", Semantics)
@pytest.mark.parametrize(
    "shape", [SHAPES[0], SHAPES[3], *(pytest.param(SHAPES[n], marks=pytest.mark.slow) for n in (4, 5, 10))]
)
def test_the_ilp_proves_the_brute_force_optimum(shape: dict[str, Any], semantics: Semantics) -> None:
    problem = tiny(5, semantics=semantics, **shape)
    result = plan(problem, planner="ilp", deadline_s=60, clock=time.process_time)
    assert result.cost.total_s == pytest.approx(optimum(problem), rel=1e-6)
    assert result.status is SolutionStatus.OPTIMAL
    assert result.gap < 1e-6


def test_the_ilp_weighs_moves_speeds_and_nothing_optional() -> None:
    current = contiguous(2, 4, tiny().workers)
    problem = tiny(4, current=current, expert_bytes=10**6, horizon_steps=10, covariance=False, speeds=(1.0, 1.7))
    result = plan(problem, planner="ilp", deadline_s=15, clock=time.process_time)
    assert result.cost.total_s == pytest.approx(optimum(problem), rel=1e-6)
    assert result.cost.migration_s > 0 or result.moves == 0


def test_where_workers_share_cores_the_ilp_proves_what_it_can() -> None:
    problem = tiny(4, workers=3, layers=1, experts=5, node_cores=2.0)
    result = plan(problem, planner="ilp", deadline_s=15, clock=time.process_time)
    best = optimum(problem)
    assert result.lower_bound <= best * (1 + 1e-9)
    assert best <= result.cost.total_s * (1 + 1e-9)
    assert result.cost.total_s <= plan(problem, planner="greedy").cost.total_s


def test_with_scenarios_the_ilp_is_no_worse_than_its_start_and_proves_no_more_than_the_bound() -> None:
    problem = tiny(11, workers=2, scenarios=4)
    result = plan(problem, planner="ilp", deadline_s=15)
    best = optimum(problem)
    assert best <= result.cost.total_s * (1 + 1e-9)
    assert result.lower_bound <= best * (1 + 1e-9)
    solved = re.search(r"solved (\d+) times", result.reason)
    assert solved is not None
    assert int(solved[1]) < 10, "it is not solved again where nothing can be learnt"
    assert plan(problem, planner="local_search", deadline_s=9).cost.total_s == pytest.approx(best, rel=1e-6)
