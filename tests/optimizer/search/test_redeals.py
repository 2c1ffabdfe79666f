"""Moves of replicas: ranked by what they do to load and prices, and never onto a worker that has the expert."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.placement import EMPTY
from elastic_moe.optimizer.baselines.heuristics import greedy_table
from elastic_moe.optimizer.core.contract import Budget
from elastic_moe.optimizer.core.table import to_placement
from elastic_moe.optimizer.search.layer_prices import LayerPricer
from elastic_moe.optimizer.search.local_search import JointSearch
from elastic_moe.optimizer.search.redeals import best_redeals
from tests.optimizer.cases import tiny


def test_a_spare_slot_goes_to_the_expert_that_makes_a_worker_late() -> None:
    problem = tiny(
        0, layers=1, slots=(3, 3), loads=np.array([[90.0, 10.0, 10.0, 10.0]]), transitions=None, covariance=False
    )
    row = np.array([0, 1, EMPTY, 2, 3, EMPTY], dtype=np.int32)
    terms = LayerPricer(problem, row[None]).terms(0, 6, 3)
    assert best_redeals(terms, row, 1) == [(5, 0)]
    assert best_redeals(terms, np.array([0, 1, 2, 3, 0, EMPTY], dtype=np.int32), 1)[0][1] != 0


@pytest.mark.parametrize("uncertain", [2, 3])
def test_of_two_experts_alike_the_one_whose_load_is_less_certain_gets_the_spare_slot(uncertain: int) -> None:
    covariance = np.eye(4)
    covariance[uncertain, uncertain] = 50.0
    problem = dataclasses.replace(
        tiny(0, layers=1, slots=(3, 3), loads=np.array([[4.0, 4.0, 10.0, 10.0]]), transitions=None, covariance=False),
        load_covariance=covariance[None],
    )
    row = np.array([0, 1, EMPTY, 2, 3, EMPTY], dtype=np.int32)
    assert best_redeals(LayerPricer(problem, row[None]).terms(0, 6, 3), row, 1) == [(2, uncertain)]


def test_without_spare_slots_nothing_moves() -> None:
    problem = tiny(0)
    table = greedy_table(problem, np.random.default_rng(0))
    assert best_redeals(LayerPricer(problem, table).terms(0, 6, 3), table[0], 4) == []


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), power=st.sampled_from([1, 3, 6]), covariance=st.booleans())
def test_the_promise_is_the_change_of_load_risk_and_prices(seed: int, power: int, covariance: bool) -> None:
    """Without traffic to weigh, a move that promises to gain gains, and leaves a legal table."""
    problem = tiny(
        seed,
        layers=2,
        experts=5,
        workers=3,
        slots=(3, 3, 2),
        covariance=covariance,
        token_bytes=1e-9,
        speeds=(1.0, 2.0, 1.0),
    )
    table = greedy_table(problem, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    search = JointSearch(problem, table)
    search._disturb(0, rng)
    terms, row = search.pricer.terms(0, power, 2), search.table[0]
    before = terms.objective(row)
    for slot, expert in best_redeals(terms, row, 3):
        after = row.copy()
        after[slot] = expert
        moved = search.table.copy()
        moved[0] = after
        assert to_placement(problem, moved).num_layers == 2
        # the potential is above the norm wherever it is not at its present state, so that its promise is kept
        assert terms.objective(after) < before + 1e-15


def test_a_descent_with_replicas_ends_where_no_move_gains() -> None:
    problem = tiny(3, layers=1, experts=6, workers=3, slots=(3, 3, 3))
    search = JointSearch(problem, greedy_table(problem, np.random.default_rng(0)))
    terms = search.pricer.terms(0, 6, 3)
    start = terms.objective(search.table[0])
    search.descend(0, 6, 3, Budget.of(5))
    end = terms.objective(search.table[0])
    assert end <= start
    for slot, expert in best_redeals(terms, search.table[0], 6):
        after = search.table[0].copy()
        after[slot] = expert
        assert terms.objective(after) >= end * (1 - 1e-9)
    assert search.total_s == pytest.approx(LayerPricer(problem, search.table).total_s(search.table))
