"""The autoscaler's arithmetic, and that no constant load makes it swing."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.decisions.autoscaling import (
    DOWN_COOLDOWN,
    REST,
    UP_COOLDOWN,
    Policy,
    Sample,
    Verdict,
    demand,
    recommend,
)

POLICY = Policy(min_workers=1, max_workers=8, seats_per_worker=10)


def steady(waiting: int, running: int, kv_usage: float, until: float = 1000.0) -> list[Sample]:
    times = [until - POLICY.window_s + second for second in range(int(POLICY.window_s) + 1)]
    return [Sample(at_s=at, waiting=waiting, running=running, kv_usage=kv_usage) for at in times]


def after(samples: list[Sample], workers: int, *, since: float = 500.0, policy: Policy = POLICY) -> Verdict:
    return recommend(policy, samples, workers=workers, now=1000.0, changed_at=1000.0 - since)


@pytest.mark.parametrize(
    ("waiting", "running", "kv_usage", "workers", "target"),
    [
        (0, 10, 0.3, 2, 2),
        (0, 19, 0.3, 2, 3),
        (100, 20, 0.3, 2, 4),
        (0, 4, 0.95, 2, 3),
        (4, 4, 0.9, 2, 4),
        (0, 0, 0.0, 4, 3),
        (0, 0, 0.0, 1, 1),
        (500, 80, 1.0, 8, 8),
        (0, 12, 0.2, 4, 3),
        (0, 16, 0.2, 4, 4),
        (0, 2, 0.45, 2, 2),
    ],
)
def test_target(waiting: int, running: int, kv_usage: float, workers: int, target: int) -> None:
    assert after(steady(waiting, running, kv_usage), workers).target == target


def test_it_waits_until_it_has_seen_enough() -> None:
    samples = steady(100, 20, 1.0)[5:]
    assert after(samples, 2) == Verdict(target=2, reason="the load has not been seen for 15 s")
    assert after([], 2).target == 2


def test_it_waits_after_a_change_and_longer_to_go_down() -> None:
    busy, idle = steady(100, 20, 1.0), steady(0, 0, 0.0)
    up_s, down_s = UP_COOLDOWN * POLICY.window_s, DOWN_COOLDOWN * POLICY.window_s
    assert after(busy, 2, since=up_s - 1).target == 2
    assert after(busy, 2, since=up_s).target == 4
    assert after(idle, 2, since=down_s - 1).target == 2
    assert after(idle, 2, since=down_s).target == 1


def test_one_busy_moment_keeps_the_workers_and_adds_none() -> None:
    samples = [*steady(0, 0, 0.0)[:-1], Sample(at_s=1000.0, waiting=30, running=20, kv_usage=0.9)]
    assert after(samples, 2).target == 2


def test_limits_hold_at_once() -> None:
    tight = Policy(min_workers=3, max_workers=4, seats_per_worker=10)
    assert after([], 2, since=0, policy=tight) == Verdict(target=3, reason="at least 3 workers must serve")
    assert after([], 6, since=0, policy=tight) == Verdict(target=4, reason="at most 4 workers may serve")


@pytest.mark.parametrize(
    ("workers", "idle_s", "since", "running", "may_rest", "target"),
    [
        (1, REST * 15, 500.0, 0, True, 0),
        (1, REST * 15 - 1, 500.0, 0, True, 1),
        (1, REST * 15, REST * 15 - 1, 0, True, 1),
        (1, REST * 15, 500.0, 1, True, 1),
        (1, REST * 15, 500.0, 0, False, 1),
        (2, REST * 15, 500.0, 0, True, 1),
    ],
)
def test_no_worker_is_kept_where_there_was_no_request_for_long(
    workers: int, idle_s: float, since: float, running: int, may_rest: bool, target: int
) -> None:
    policy = Policy(min_workers=1, max_workers=8, seats_per_worker=10, may_rest=may_rest)
    verdict = recommend(policy, steady(0, running, 0.0), workers=workers, now=1000.0, changed_at=1000.0 - since,
                        idle_since=1000.0 - idle_s)  # fmt: skip
    assert verdict.target == target


samples_strategy = st.lists(
    st.builds(
        Sample,
        at_s=st.floats(900, 1000),
        waiting=st.integers(0, 1000),
        running=st.integers(0, 500),
        kv_usage=st.floats(0, 1),
    ),
    max_size=30,
).map(lambda samples: sorted(samples, key=lambda s: s.at_s))


@settings(deadline=None)
@given(samples_strategy, st.integers(1, 12), st.integers(1, 6), st.integers(0, 6), st.floats(0, 500))
def test_the_target_stays_within_limits_and_has_a_reason(
    samples: list[Sample], workers: int, least: int, more: int, since: float
) -> None:
    policy = Policy(min_workers=least, max_workers=least + more, seats_per_worker=10)
    verdict = after(samples, workers, since=since, policy=policy)
    assert least <= verdict.target <= least + more
    assert verdict.reason


@settings(deadline=None)
@given(st.integers(0, 120), st.floats(0, 6), st.integers(1, 8))
def test_a_constant_load_never_makes_it_swing(requests: int, cache: float, workers: int) -> None:
    """cache: what the requests need of one worker's KV cache. The size goes one way, and then stays."""
    sizes = [workers]
    for _ in range(20):
        size = sizes[-1]
        running = min(requests, 10 * size, int(requests * size / cache) if cache > size else requests)
        usage = min(1.0, cache / size * running / requests) if requests else 0.0
        sizes.append(after(steady(requests - running, running, usage), size).target)
    steps = [b - a for a, b in pairwise(sizes) if a != b]
    assert all(step > 0 for step in steps) or all(step < 0 for step in steps)
    assert sizes[-1] == sizes[-2]


def test_waiting_requests_count_like_running_ones() -> None:
    sample = Sample(at_s=0, waiting=5, running=5, kv_usage=0.6)
    assert demand(sample, workers=2, seats_per_worker=100) == pytest.approx(1.2)
    assert demand(sample, workers=1, seats_per_worker=5) == pytest.approx(2.0)
