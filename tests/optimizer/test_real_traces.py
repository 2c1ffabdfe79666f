"""What planning is worth on recorded routing: profiled on the first half of the requests, measured on the second.

Deadlines count the processor's time, so that a busy machine plans as well as an idle one.
"""

import dataclasses
import time
from pathlib import Path

import pytest

from elastic_moe.optimizer import plan
from elastic_moe.optimizer.core.cost import copies, price
from elastic_moe.optimizer.study.metrics import measure
from elastic_moe.optimizer.study.scenario import make_workers, problem_from_trace
from elastic_moe.optimizer.study.traces import load_trace

pytestmark = pytest.mark.slow

EIGHT = make_workers(8, nodes=1, num_experts=64)


@pytest.mark.parametrize("task", ["law", "intent", "translation"])
def test_auto_beats_two_step_planning_on_unseen_requests(traces: Path, task: str) -> None:
    """Compared with the bounds that hold with a short deadline, not the best that ten seconds give."""
    profile, test = load_trace(traces / f"{task}.npz").halves()
    problem = problem_from_trace(profile, EIGHT)
    greedy = measure(test, plan(problem, planner="greedy").placement)
    auto = plan(problem, deadline_s=1, clock=time.process_time)
    found = measure(test, auto.placement)
    # greedy's clusters, mapped at best, keep 0.15 of the transitions: what the two-step ILPs reach
    # some of both is given for loads that another subject shifts less
    assert found.same_worker_transitions > 1.4 * 0.15
    assert found.fan_out < 0.92 * greedy.fan_out
    assert found.load_imbalance < greedy.load_imbalance + 0.025
    assert auto.lower_bound < auto.cost.total_s


def test_on_other_subjects_auto_costs_no_more_than_greedy_on_average(traces: Path) -> None:
    """Without the prior for a change of subject, it costs 3 % more, and in one pair 13 %."""
    each = {name: load_trace(traces / f"{name}.npz") for name in ("intent", "law", "translation")}
    problems = {name: problem_from_trace(trace, EIGHT) for name, trace in each.items()}
    ratios = []
    for name, problem in problems.items():
        auto = plan(problem, deadline_s=0.6, clock=time.process_time).placement
        greedy = plan(problem, planner="greedy").placement
        others = [other for key, other in problems.items() if key != name]
        ratios += [price(other, auto).realised_s / price(other, greedy).realised_s for other in others]
    assert sum(ratios) / len(ratios) < 1.012
    assert max(ratios) < 1.10


def test_under_drift_few_moves_bring_most_of_the_gain(traces: Path) -> None:
    old = plan(problem_from_trace(load_trace(traces / "law.npz"), EIGHT), deadline_s=0.6, clock=time.process_time)
    problem = problem_from_trace(load_trace(traces / "translation.npz"), EIGHT, current=old.placement)
    scratch = plan(dataclasses.replace(problem, current=None), deadline_s=0.6, clock=time.process_time).placement
    moves = copies(problem, scratch.physical_to_logical_map)
    result = plan(dataclasses.replace(problem, move_budget=moves // 4), deadline_s=1, clock=time.process_time)
    before = price(problem, old.placement).step_s
    assert result.moves <= moves // 4
    assert before - result.cost.step_s > 0.8 * (before - price(problem, scratch).step_s)
