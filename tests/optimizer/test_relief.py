"""The planner `relief`: within its budget, never dearer than to stay, and it takes from the busiest worker."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.placement import contiguous
from elastic_moe.optimizer import plan
from elastic_moe.optimizer.core.contract import Budget
from elastic_moe.optimizer.core.cost import load_imbalance, shares
from elastic_moe.optimizer.relief import RELIEF_SHARE, relieved
from elastic_moe.optimizer.search.local_search import JointSearch
from tests.optimizer.cases import tiny


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slots=st.sampled_from([(4, 4, 4), (5, 4, 4), (5, 5, 5), (12, 1, 1)]),
    most=st.integers(0, 6),
    scenarios=st.sampled_from([0, 3]),
)
def test_each_swap_is_legal_and_takes_something_off_the_busiest_worker(
    seed: int, slots: tuple[int, ...], most: int, scenarios: int
) -> None:
    problem = tiny(seed, layers=3, experts=12, workers=3, slots=slots, speeds=(1.0, 2.0, 1.0), scenarios=scenarios)
    rng = np.random.default_rng(seed)
    search = JointSearch(problem, contiguous(3, 12, problem.workers).physical_to_logical_map)
    for layer in range(3):
        search._disturb(layer, rng)
    table, swaps = relieved(problem, search.table, most, Budget.of(60))
    assert swaps <= most
    before, after = (load_imbalance(problem, shares(problem, each)) for each in (search.table, table))
    assert (after <= before + 1e-12).all()
    assert (after.sum() < before.sum()) == (swaps > 0)
    assert plan(dataclasses.replace(problem, current=None), planner="relief").placement.num_layers == 3


def test_relief_keeps_to_its_budget_and_stays_where_moves_cost_more_than_they_gain() -> None:
    problem = tiny(3, layers=4, experts=32, workers=4, covariance=False)
    current = contiguous(4, 32, problem.workers)
    result = plan(dataclasses.replace(problem, current=current), planner="relief")
    assert 0 < result.moves <= max(RELIEF_SHARE * 4 * 32, 2 * 4)
    assert result.imbalance < (result.imbalance_before or 0)
    assert plan(dataclasses.replace(problem, current=current, move_budget=2), planner="relief").moves == 2
    dear = dataclasses.replace(problem, current=current, expert_bytes=10**12, horizon_steps=1)
    assert plan(dear, planner="relief").moves == 0


def test_two_swaps_take_most_of_the_excess_of_two_layers() -> None:
    """One worker has the two heavy experts of each layer."""
    loads = np.ones((2, 8))
    loads[:, :2] = 50.0
    problem = tiny(0, layers=2, experts=8, workers=4, loads=loads, transitions=None, covariance=False)
    table, swaps = relieved(problem, contiguous(2, 8, problem.workers).physical_to_logical_map, 2, Budget.of(60))
    assert swaps == 2
    assert load_imbalance(problem, shares(problem, table)) == pytest.approx([51 / 26.5] * 2)
