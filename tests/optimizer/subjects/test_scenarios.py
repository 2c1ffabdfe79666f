"""Mean and tail of scenarios: between the mean and the worst, linear for a fixed order, and what no order beats."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.optimizer.subjects.scenarios import (
    WORST_SHARE,
    blended,
    blended_weights,
    mean_of_scenarios,
    shares_of,
    tail_weights,
)

PRICES = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.01, 5)), min_size=1, max_size=12)


@given(PRICES, st.floats(0, 1))
def test_the_price_lies_between_mean_and_worst_and_its_weights_explain_it(
    scenarios: list[tuple[float, float]], tail: float
) -> None:
    prices, weights = (np.array(column) for column in zip(*scenarios, strict=True))
    weights = weights / weights.sum()
    price, mean = blended(prices, weights, tail), float(prices @ weights)
    assert mean - 1e-9 <= price <= prices.max() + 1e-9
    found = blended_weights(prices, weights, tail)
    assert found.sum() == pytest.approx(1.0)
    assert (found >= 0).all()
    assert found @ prices == pytest.approx(price)


@given(PRICES, st.integers(0, 10**6))
def test_no_other_quarter_is_dearer(scenarios: list[tuple[float, float]], seed: int) -> None:
    prices, weights = (np.array(column) for column in zip(*scenarios, strict=True))
    weights = weights / weights.sum()
    worst = tail_weights(prices, weights) @ prices
    assert (tail_weights(prices, weights) <= weights / WORST_SHARE + 1e-9).all()
    other = tail_weights(np.random.default_rng(seed).random(len(prices)), weights)
    assert other @ prices <= worst + 1e-9


@given(PRICES)
def test_a_dearer_scenario_never_lowers_the_price(scenarios: list[tuple[float, float]]) -> None:
    prices, weights = (np.array(column) for column in zip(*scenarios, strict=True))
    weights = weights / weights.sum()
    dearer = prices.copy()
    dearer[0] *= 1.5
    assert blended(dearer, weights, 0.5) >= blended(prices, weights, 0.5) - 1e-12


def test_the_worst_quarter_of_eight_is_two_and_of_two_half_of_one() -> None:
    even = np.full(8, 1 / 8)
    assert blended(np.arange(8.0), even, 1.0) == pytest.approx(6.5)
    assert blended(np.array([1.0, 3.0]), np.array([0.5, 0.5]), 1.0) == pytest.approx(3.0)


def test_scenarios_of_any_size_weigh_what_they_are_given() -> None:
    loads = np.array([[[1.0, 3.0]], [[30.0, 10.0]]])
    assert mean_of_scenarios(loads, (3, 1), np.array([4.0])).tolist() == [[1.5, 2.5]]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 1.0), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_wrong_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(PlacementError, match="weights: expected"):
        shares_of(weights, 2)
