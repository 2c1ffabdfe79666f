"""Every solver through one adapter: answers, limits, and what is said where one cannot be used."""

import importlib.util
import time
from typing import Any

import numpy as np
import pyomo.environ as pyo
import pytest

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.optimizer import SolutionStatus, plan
from elastic_moe.optimizer.baselines.load_ilp import build_load_model, chosen_workers, start_from
from elastic_moe.optimizer.core import solvers
from elastic_moe.optimizer.core.solvers import SOLVERS, SolverError, cbc_binary, solve
from tests.optimizer.cases import tiny


def model(items: int = 8, workers: int = 3, seed: int = 0) -> tuple[pyo.ConcreteModel, np.ndarray]:
    weights = np.random.default_rng(seed).integers(1, 50, items).astype(float)
    room = [-(-items // workers)] * workers
    return build_load_model(weights, np.ones(workers), room, np.arange(items, dtype=np.int32)), weights


def available(solver: str) -> str:
    if solver == "cbc" and cbc_binary() is None:
        pytest.skip("no cbc here")
    if solver == "gurobi" and importlib.util.find_spec("gurobipy") is None:
        pytest.skip("no gurobipy here")
    return solver


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_agree(solver: str) -> None:
    built, weights = model()
    answer = solve(built, solver=available(solver), time_limit_s=10, gap=1e-6)
    assert answer.optimal
    load = np.bincount(chosen_workers(built), weights)
    assert answer.objective == pytest.approx(load.max())
    assert answer.bound == pytest.approx(load.max(), rel=1e-5)
    reference, _ = model()
    assert answer.objective == pytest.approx(solve(reference, solver="highs", time_limit_s=10, gap=1e-6).objective)


@pytest.mark.parametrize("solver", SOLVERS)
def test_infeasible_models_have_no_answer(solver: str) -> None:
    built, _ = model()
    built.never = pyo.Constraint(expr=built.x[0, 0] + built.x[0, 1] + built.x[0, 2] <= 0)
    answer = solve(built, solver=available(solver), time_limit_s=10)
    assert answer.objective is None
    assert not answer.optimal


@pytest.mark.parametrize("solver", SOLVERS)
def test_running_out_of_time_leaves_an_incumbent_or_nothing(solver: str) -> None:
    built, weights = model(60, 7, seed=3)
    start = np.arange(60, dtype=np.int32) % 7
    start_from(built, start, float(np.bincount(start, weights).max()))
    answer = solve(built, solver=available(solver), time_limit_s=0.3, gap=0.0)
    if answer.objective is not None:
        assert answer.objective >= answer.bound - 1e-6
        assert np.bincount(chosen_workers(built), weights).max() <= answer.objective * (1 + 1e-4)


def test_a_missing_solver_is_named_and_greedy_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "cbc_binary", lambda: None)
    built, _ = model()
    with pytest.raises(SolverError, match=r"elastic-moe\[cbc\]"):
        solve(built, solver="cbc", time_limit_s=1)
    result = plan(tiny(), planner="load_ilp", solver="cbc", deadline_s=2)
    assert result.status is SolutionStatus.FALLBACK
    assert "cbc" in result.reason
    # a clock of the processor's time: a busy machine might leave no time for the ILP, which says nothing then
    assert "no ILP" in plan(tiny(), planner="auto", solver="cbc", deadline_s=0.5, clock=time.process_time).reason


@pytest.mark.parametrize("package", ["highspy", "gurobipy"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name == package else real(name, *rest)

    monkeypatch.setattr(solvers.util, "find_spec", find)
    built, _ = model()
    with pytest.raises(SolverError, match="not installed: pip install"):
        solve(built, solver={"highspy": "highs", "gurobipy": "gurobi"}[package], time_limit_s=1)


def test_gurobis_free_limit_is_explained() -> None:
    available("gurobi")
    built, _ = model(260, 8)
    with pytest.raises(SolverError, match="2000 variables and as many constraints, this model has 2081"):
        solve(built, solver="gurobi", time_limit_s=2)


def test_unknown_solvers_are_named() -> None:
    with pytest.raises(ConfigError, match="abacus"):
        solve(model()[0], solver="abacus", time_limit_s=1)
