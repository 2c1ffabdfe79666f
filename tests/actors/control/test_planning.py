"""What the coordinator tells planners of a window."""

import dataclasses

import numpy as np
import pytest

from elastic_moe.actors.control.planning import build_problem
from elastic_moe.cluster.placement import Worker, WorkerId, contiguous
from elastic_moe.optimizer.core.estimate import estimate_coactivation
from tests.actors.fakes import MODEL

LAYERS, EXPERTS = 2, 6
TOLD = dataclasses.replace(MODEL, num_layers=LAYERS, num_logical_experts=EXPERTS, top_k=2)
PLACEMENT = contiguous(LAYERS, EXPERTS, tuple(Worker(id=WorkerId(f"w{i}"), node="n", slots=3) for i in range(2)))


def test_problems_carry_how_loads_vary_and_the_transitions() -> None:
    rng = np.random.default_rng(0)
    parts = rng.integers(1, 50, size=(5, LAYERS, EXPERTS))
    parts[:, :, 1] = parts[:, :, 0]
    transitions = rng.integers(1, 9, size=(LAYERS - 1, EXPERTS, EXPERTS))
    problem = build_problem(TOLD, PLACEMENT, parts.sum(axis=0) * 1.0, transitions, dtype="bfloat16", parts=parts)
    assert problem.load_covariance is not None
    assert problem.load_covariance[0, 0, 1] > 0
    assert problem.transitions is not None
    # workers count no co-activation: what shares successors counts as chosen together
    assert np.array_equal(problem.pairs, estimate_coactivation(problem))


@pytest.mark.parametrize("parts", [None, np.ones((2, LAYERS, EXPERTS), dtype=np.int64)])
def test_too_few_parts_give_no_variation(parts: np.ndarray | None) -> None:
    nothing = np.zeros((LAYERS - 1, EXPERTS, EXPERTS), dtype=np.int64)
    problem = build_problem(TOLD, PLACEMENT, np.zeros((LAYERS, EXPERTS)), nothing, dtype="bfloat16", parts=parts)
    assert problem.load_covariance is None
    assert problem.transitions is None
    assert (problem.loads == 1).all()
