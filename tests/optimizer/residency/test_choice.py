"""How fast memory is dealt over layers: against every way to deal it."""

import itertools

import numpy as np
import pytest

from elastic_moe.optimizer.residency.choice import NEVER_S, dealt, split


@pytest.mark.parametrize("seed", range(5))
def test_a_split_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.random((3, 4))
    costs[:, 0] = NEVER_S
    for budget in (3, 5, 9, 12):
        slots = split(costs, budget)
        best = min(
            sum(costs[layer, s] for layer, s in enumerate(each))
            for each in itertools.product(range(4), repeat=3)
            if sum(each) <= budget
        )
        assert slots.sum() <= budget
        assert costs[np.arange(3), slots].sum() == pytest.approx(best)


def _waits(outside: list[np.ndarray], rooms: np.ndarray, busy: np.ndarray, slope: np.ndarray) -> float:
    seconds = np.stack([curve[np.arange(len(curve)), rooms[:, rank]] for rank, curve in enumerate(outside)])
    return float(np.maximum(seconds.max(axis=0) + slope * seconds.sum(axis=0), busy).sum())


@pytest.mark.parametrize("seed", range(5))
def test_workers_have_room_in_the_same_layers(seed: int) -> None:
    """Two experts in each of four layers and room for five: full layers help only where both workers have them."""
    rng = np.random.default_rng(seed)
    active = 0.3 + 0.1 * rng.random((2, 4, 2))
    # without a slot nothing is served, with one slot both experts pass, and with two nothing is fetched
    outside = [np.stack([np.full(4, NEVER_S), each.sum(axis=1), np.zeros(4)], axis=1) for each in active]
    busy, slope, budgets = np.zeros(4), np.full(4, 0.1), np.array([5, 5])
    rooms = dealt(outside, budgets, busy, slope, np.zeros(2))
    every = [np.array(each) for each in itertools.product((1, 2), repeat=4) if sum(each) <= 5]
    best = min(_waits(outside, np.stack(pair, axis=1), busy, slope) for pair in itertools.product(every, repeat=2))
    assert (rooms[:, 0] == rooms[:, 1]).all()
    assert _waits(outside, rooms, busy, slope) == pytest.approx(best)


def test_no_room_is_given_where_computing_takes_longer() -> None:
    outside = [np.array([[NEVER_S, 3.0, 0.0], [NEVER_S, 2.0, 0.0]])]
    rooms = dealt(outside, np.array([3]), np.array([3.0, 0.0]), np.zeros(2), np.zeros(1))
    assert rooms[:, 0].tolist() == [1, 2], "the first layer takes 3 s anyway"


def test_room_that_costs_more_than_it_saves_is_not_given() -> None:
    outside = [np.array([[NEVER_S, 3.0, 0.0], [NEVER_S, 2.0, 0.0]]) for _ in range(2)]
    busy, slope = np.zeros(2), np.zeros(2)
    for rent, slots in ((0.0, [2, 2]), (1.2, [2, 1]), (2.0, [1, 1])):
        rooms = dealt(outside, np.array([4, 4]), busy, slope, np.full(2, rent))
        assert rooms.T.tolist() == [slots, slots], "a slot on each of two workers saves 3 s or 2 s"
    rooms = dealt(outside, np.array([4, 3]), busy, slope, np.array([0.5, 1.0]))
    assert rooms[:, 1].tolist() == [2, 1]
