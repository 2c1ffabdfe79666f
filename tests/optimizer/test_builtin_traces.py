"""Planning on the routing of the built-in model. Deadlines count the processor's time."""

from __future__ import annotations

import dataclasses
import time

import pytest

from elastic_moe.deploy.launch.builtin import trace_names, trace_path
from elastic_moe.optimizer import plan
from elastic_moe.optimizer.core.cost import copies, price
from elastic_moe.optimizer.study.metrics import measure
from elastic_moe.optimizer.study.scenario import make_workers, problem_from_trace
from elastic_moe.optimizer.study.traces import Trace, load_trace

pytestmark = pytest.mark.slow

FOUR = make_workers(4, nodes=1, num_experts=16)


def trace(name: str) -> Trace:
    return load_trace(trace_path(f"builtin:{name}"))


@pytest.mark.parametrize("name", trace_names())
def test_planning_helps_on_unseen_requests(name: str) -> None:
    profile, test = trace(name).halves()
    problem = problem_from_trace(profile, FOUR)
    contiguous, greedy, auto = (
        measure(test, plan(problem, planner=planner, deadline_s=0.4, clock=time.process_time).placement)
        for planner in ("contiguous", "greedy", "auto")
    )
    assert greedy.load_imbalance < contiguous.load_imbalance
    assert auto.load_imbalance < contiguous.load_imbalance


def test_a_placement_for_one_subject_is_worse_for_another_and_few_moves_mend_most() -> None:
    old = plan(problem_from_trace(trace("bible"), FOUR), deadline_s=0.4, clock=time.process_time).placement
    problem = problem_from_trace(trace("code"), FOUR, current=old)
    scratch = plan(dataclasses.replace(problem, current=None), deadline_s=0.4, clock=time.process_time).placement
    before = price(problem, old).step_s
    best = price(problem, scratch).step_s
    assert best < before
    budget = copies(problem, scratch.physical_to_logical_map) // 2
    result = plan(dataclasses.replace(problem, move_budget=budget), deadline_s=0.4, clock=time.process_time)
    assert result.moves <= budget
    assert before - result.cost.step_s > 0.5 * (before - best)
