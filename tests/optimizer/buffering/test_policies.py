"""The policies by hand, and MIN against every possible sequence of victims."""

import itertools
from functools import cache

import numpy as np
import pytest

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.optimizer.buffering.belady import fewest_misses
from elastic_moe.optimizer.buffering.interface import Policy
from elastic_moe.optimizer.buffering.lfru import Lfru
from elastic_moe.optimizer.buffering.lfu import Lfu
from elastic_moe.optimizer.buffering.lifo import Lifo
from elastic_moe.optimizer.buffering.lru import Lru
from elastic_moe.optimizer.buffering.policies import DEFAULT_POLICY, POLICIES, make_policy
from elastic_moe.optimizer.buffering.simulate import replay
from elastic_moe.optimizer.buffering.static import Static


def _noted(policy: Policy, *steps: list[int]) -> Policy:
    for step in steps:
        policy.note(step)
    return policy


def test_lifo_lets_the_newest_inactive_expert_go_and_else_the_newest() -> None:
    policy = _noted(Lifo(), [0, 3])
    assert policy.victim([0, 1, 2, 3], ()) == 2
    assert policy.victim([3, 0], ()) == 0
    assert policy.victim([0, 1, 2, 3], {2}) == 1


def test_lru_lets_the_expert_go_whose_last_step_is_longest_ago() -> None:
    policy = _noted(Lru(5), [0, 1], [2], [1, 3])
    assert policy.victim([3, 2, 1, 0], ()) == 0
    assert policy.victim([3, 2, 1, 0], {0}) == 2
    assert policy.victim([3, 1], ()) == 3, "of one step, the one that came first"
    assert policy.victim([3, 4, 1], ()) == 4, "one that was never used"


def test_lfu_lets_the_expert_go_that_had_the_fewest_steps() -> None:
    policy = _noted(Lfu(4), [0, 1], [0], [0, 2], [2, 3], [3])
    assert policy.victim([0, 2, 3, 1], ()) == 1
    assert policy.victim([3, 0, 2], ()) == 3


def test_static_never_learns() -> None:
    policy = _noted(Static([1, 5, 3]), [0], [0], [0])
    assert policy.victim([2, 1, 0], ()) == 0


def test_lfru_weighs_the_last_steps_and_the_frequency() -> None:
    steps = [[0]] * 200 + [[1]]
    assert _noted(Lfru(3), *steps).victim([0, 1], ()) == 1, "one recent step is less than two hundred"
    assert _noted(Lfru(3), [0], [2], [1]).victim([0, 2, 1], ()) == 0, "at equal frequency, the older use leaves"
    forgotten = [[0]] * 30 + [[1]] * 60
    assert _noted(Lfru(3), *forgotten).victim([0, 1], ()) == 0, "what was frequent once fades"


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_chooses_a_needed_expert(name: str) -> None:
    rng = np.random.default_rng(0)
    policy = make_policy(name, 8)
    for _ in range(50):
        policy.note(rng.permutation(8)[:3].tolist())
        candidates = rng.permutation(8)[:4].tolist()
        needed = set(candidates[: int(rng.integers(4))])
        assert policy.victim(candidates, needed) in set(candidates) - needed


def test_names() -> None:
    assert DEFAULT_POLICY in POLICIES
    with pytest.raises(ConfigError, match="expert_cache_policy: expected one of lfru, lfu, lru, lifo, got 'fifo'"):
        make_policy("fifo", 4)


def _fewest_misses(steps: list[list[int]], slots: int) -> int:
    """By trying everything that a cache may keep after each step."""

    @cache
    def serve(step: int, held: frozenset[int]) -> int:
        if step == len(steps):
            return 0
        seen = sorted(held | set(steps[step]))
        kept = itertools.combinations(seen, min(slots, len(seen)))
        return len(set(steps[step]) - held) + min(serve(step + 1, frozenset(each)) for each in kept)

    return serve(0, frozenset())


@pytest.mark.parametrize(("seed", "slots"), [*itertools.product(range(4), (1, 2, 3))])
def test_nothing_misses_less_than_belady(seed: int, slots: int) -> None:
    rng = np.random.default_rng(seed)
    steps = [rng.permutation(5)[: int(rng.integers(1, 4))].tolist() for _ in range(9)]
    counts = fewest_misses(steps, slots)
    assert counts.accesses - counts.hits == _fewest_misses(steps, slots)
    for name in POLICIES:
        assert replay(steps, make_policy(name, 5), slots).hits <= counts.hits


def test_replay_counts_accesses_hits_and_misses_of_each_step() -> None:
    steps = [[0, 1], [0], [2, 0], [1]]
    counts = replay(steps, Lru(3), 2)
    assert (counts.accesses, counts.hits, counts.misses_by_step) == (6, 2, (2, 0, 1, 1))
    later = replay(steps, Lru(3), 2, skip=1)
    assert (later.accesses, later.hits, later.miss_rate) == (4, 2, 0.5)


def test_pinned_experts_never_miss_and_never_leave() -> None:
    steps = [[0, 1, 2], [0, 1, 2], [0]]
    counts = replay(steps, Lru(3), 1, pinned=[0])
    assert counts.misses_by_step == (2, 1, 0), "the last one that came is there when the next step begins"


def test_a_cache_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="area: expected at least one slot, got 0"):
        replay([[0]], Lru(1), 0)
