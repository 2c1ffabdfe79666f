"""plan(): every planner answers with a verified placement, a price and a reason; failures fall back to greedy."""

import pickle

import numpy as np
import pytest

from elastic_moe.cluster import config
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.placement import Worker, WorkerId
from elastic_moe.optimizer import PLANNERS, PlacementProblem, PlanResult, SolutionStatus, Termination, plan
from elastic_moe.optimizer import planner as planner_module
from elastic_moe.optimizer.core.cost import price
from elastic_moe.optimizer.core.solvers import SolverError


def problem(layers: int = 3, experts: int = 8, workers: int = 4, spare: int = 0) -> PlacementProblem:
    rng = np.random.default_rng(5)
    slots = experts // workers + spare
    return PlacementProblem(
        loads=rng.integers(1, 100, (layers, experts)),
        top_k=2,
        workers=tuple(Worker(id=WorkerId(f"w{i}"), node=f"n{i // 2}", slots=slots) for i in range(workers)),
        expert_bytes=1000,
    )


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("spare", [0, 1])
def test_every_planner_answers_within_its_deadline(planner: str, spare: int) -> None:
    given = pickle.loads(pickle.dumps(problem(spare=spare)))
    result: PlanResult = pickle.loads(pickle.dumps(plan(given, planner=planner, deadline_s=0.4)))
    assert result.cost == price(given, result.placement)
    assert 0 <= result.lower_bound <= result.cost.total_s
    assert result.seconds < 3
    assert result.reason


def test_a_failing_solver_falls_back_to_greedy_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise SolverError("no such solver here")

    monkeypatch.setitem(planner_module._PLANNERS, "ilp", fails)
    result = plan(problem(), planner="ilp")
    assert result.status is SolutionStatus.FALLBACK
    assert result.termination is Termination.SOLVER_FAILED
    assert result.planner == "greedy"
    assert "no such solver here" in result.reason


@pytest.mark.parametrize(
    ("wrong", "field"),
    [({"planner": "best"}, "planner"), ({"solver": "abacus"}, "solver"), ({"deadline_s": 0}, "deadline")],
)
def test_wrong_arguments_are_named(wrong: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        plan(problem(), **wrong)


def test_the_flag_knows_every_planner() -> None:
    assert PLANNERS == config.PLANNERS
