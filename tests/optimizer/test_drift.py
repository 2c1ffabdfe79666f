"""Re-placement under drift: the rule, the curve of gain against moves, the budget, and the simulation."""

import dataclasses
import time
from functools import cache

import numpy as np
import pytest

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.placement import contiguous
from elastic_moe.optimizer import Policy, decide, plan
from elastic_moe.optimizer.core.contract import Budget
from elastic_moe.optimizer.core.cost import copies, price, price_table
from elastic_moe.optimizer.core.problem import PlacementProblem
from elastic_moe.optimizer.drift import frontier
from elastic_moe.optimizer.relief import relieved
from elastic_moe.optimizer.study.generate import generate_trace
from elastic_moe.optimizer.study.scenario import make_workers, problem_from_trace
from elastic_moe.optimizer.study.simulate import SimulationSettings, simulate
from elastic_moe.optimizer.study.traces import Trace, TraceError, concatenate


def task(seed: int, tokens: int = 1500) -> Trace:
    return generate_trace(num_layers=4, num_experts=16, top_k=2, num_tokens=tokens, num_themes=12, task_seed=seed)


@cache
def drifted() -> PlacementProblem:
    """Planned for one task, then another comes."""
    workers = make_workers(4, nodes=1, num_experts=16)
    task_1 = problem_from_trace(task(1), workers)
    old = plan(task_1, planner="local_search", deadline_s=0.4, clock=time.process_time).placement
    return problem_from_trace(task(2), workers, current=old, expert_bytes=10**6)


def test_the_curve_starts_at_staying_and_never_pays_more_moves_for_less() -> None:
    problem = drifted()
    points = frontier(problem, Budget.of(5))
    assert points[0].moves == 0
    assert points[0].step_s == pytest.approx(price(problem, problem.current).step_s)  # type: ignore[arg-type]
    assert [p.moves for p in points] == sorted(p.moves for p in points)
    assert points[-1].step_s < points[0].step_s


@pytest.mark.parametrize("budget", [0, 1, 5, 16])
def test_a_budget_of_moves_is_kept_and_used(budget: int) -> None:
    problem = dataclasses.replace(drifted(), move_budget=budget)
    result = plan(problem, deadline_s=2)
    assert result.moves <= budget
    assert result.cost_before is not None
    assert result.cost.step_s <= result.cost_before.step_s
    assert budget < 5 or result.cost.step_s < result.cost_before.step_s


def test_without_time_a_plan_within_a_budget_is_no_worse_than_the_best_few_swaps() -> None:
    problem = dataclasses.replace(drifted(), move_budget=24)
    assert problem.current is not None
    table, swaps = relieved(problem, problem.current.physical_to_logical_map, 12, Budget.of(5))
    assert swaps > 0
    hurried = plan(problem, deadline_s=1e-4)
    assert hurried.moves <= 24
    assert hurried.cost.total_s <= price_table(problem, table).total_s * (1 + 1e-9)
    assert hurried.cost_before is not None
    assert hurried.cost.total_s < hurried.cost_before.total_s


def test_most_of_the_gain_for_a_quarter_of_the_moves() -> None:
    problem = drifted()
    scratch = plan(dataclasses.replace(problem, current=None), deadline_s=0.4, clock=time.process_time).placement
    moves = copies(problem, scratch.physical_to_logical_map)
    before = price(problem, problem.current).step_s  # type: ignore[arg-type]
    some = plan(dataclasses.replace(problem, move_budget=moves // 4), deadline_s=0.4, clock=time.process_time)
    assert before - some.cost.step_s >= 0.5 * (before - price(problem, scratch).step_s)


def test_other_workers_have_no_curve() -> None:
    problem = dataclasses.replace(drifted(), workers=make_workers(5, nodes=1, num_experts=16))
    with pytest.raises(PlacementError, match="current"):
        frontier(problem, Budget.of(1))
    result = plan(problem, planner="greedy")
    assert result.cost_before is None
    assert decide(result, tokens_per_expert=1.0, since_change_s=0.0).worthwhile


def test_the_rule_has_hysteresis() -> None:
    result = plan(dataclasses.replace(drifted(), move_budget=16), deadline_s=0.5)
    assert result.moves
    policy = Policy(min_gain=0.01, noise_gain=1.0, cooldown_s=30)
    go = decide(result, tokens_per_expert=1e9, since_change_s=None, policy=policy)
    assert go.worthwhile
    assert go.net_gain > 0.01
    wait = decide(result, tokens_per_expert=1e9, since_change_s=10, policy=policy)
    assert not wait.worthwhile
    assert "10 s after the last change (the cool-down is 30 s)" in wait.reason
    assert not decide(result, tokens_per_expert=1.0, since_change_s=None, policy=policy).worthwhile
    assert not decide(result, tokens_per_expert=0.0, since_change_s=None, policy=policy).worthwhile
    assert (
        "nothing to move"
        in decide(dataclasses.replace(result, moves=0), tokens_per_expert=1, since_change_s=None).reason
    )


def test_the_rule_tells_a_gain_that_lasts_from_one_on_what_was_seen() -> None:
    result = plan(dataclasses.replace(drifted(), move_budget=16), deadline_s=0.3)
    assert result.cost_before is not None
    before, after = result.cost_before.total_s, result.cost.total_s
    worse = dataclasses.replace(result, each_before=(before, 2 * before), each=(1.05 * before, 0.9 * before))
    refused = decide(worse, tokens_per_expert=1e9, since_change_s=None, policy=Policy(min_gain=0.01))
    assert not refused.worthwhile
    assert refused.net_gain == pytest.approx(1 - after / before)
    assert refused.seen_gain <= -0.05
    assert "a loss of more than 1.0% now" in refused.reason
    better = dataclasses.replace(worse, each=(0.8 * before, 1.9 * before))
    done = decide(better, tokens_per_expert=1e9, since_change_s=None, policy=Policy(min_gain=0.01))
    assert done.worthwhile
    assert f"{done.net_gain:.1%} with 1 remembered subject ({done.seen_gain:.1%} on what was seen)" in done.reason
    fleeting = decide(better, tokens_per_expert=1e9, since_change_s=None, policy=Policy(min_gain=done.net_gain + 0.01))
    assert not fleeting.worthwhile, "what only the window shows does not count"
    half = Policy(min_gain=1.5 * done.net_gain)
    assert not decide(better, tokens_per_expert=1e9, since_change_s=None, policy=half).worthwhile
    assert decide(better, tokens_per_expert=1e9, since_change_s=None, present_share=0.5, policy=half).worthwhile


def test_the_simulation_gains_under_drift_and_rests_without() -> None:
    workers = make_workers(4, nodes=1, num_experts=16)
    settings = SimulationSettings(
        deadline_s=0.1, interval_s=10, window_s=20, tokens_per_s=50, expert_bytes=10**6, policy=Policy(cooldown_s=15)
    )
    seen = []
    looks = simulate(concatenate([task(1), task(2)]), workers, settings, progress=seen.append)
    assert seen == looks
    assert [look.time_s for look in looks] == [10.0 * (k + 1) for k in range(6)]
    assert any(look.changed for look in looks)
    assert np.mean([look.imbalance for look in looks]) < np.mean([look.imbalance_static for look in looks])
    placed = plan(problem_from_trace(task(1), workers), deadline_s=0.3).placement
    resting = dataclasses.replace(settings, policy=Policy(min_gain=0.2), quick=False)
    calm = simulate(task(1), workers, resting, first=placed)
    assert not any(look.changed for look in calm)
    with pytest.raises(TraceError, match="takes 500 tokens at 50 tokens/s, and the trace has 100: lower --interval"):
        simulate(task(1, 100), workers, settings)
    assert contiguous(4, 16, workers).num_layers == 4
