"""Replicas chosen by a step's counts: by their holders alone, the same for all, and so that the busiest has less."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.optimizer.buffering.replicas import READ_TOKENS, ReplicaChoice


def case(seed: int, workers: int, experts: int, replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """([W, E] tokens, [W, E] who holds what)"""
    rng = np.random.default_rng(seed)
    holds = np.zeros((workers, experts), dtype=bool)
    holds[rng.integers(0, workers, experts), np.arange(experts)] = True
    for expert in rng.integers(0, experts, replicas):
        holds[rng.integers(0, workers), expert] = True
    return rng.integers(0, 4, (workers, experts)) ** 2, holds


def busiest(tokens: np.ndarray, ranks: np.ndarray) -> float:
    """With the reading of each expert on each worker that computes some of its tokens."""
    load = np.bincount(ranks[tokens > 0], tokens[tokens > 0], len(tokens))
    for rank in range(len(tokens)):
        load[rank] += READ_TOKENS * ((ranks == rank) & (tokens > 0)).any(axis=0).sum()
    return float(load.max())


def in_turn(holds: np.ndarray) -> np.ndarray:
    """[W, E] by rank alone: a worker's own replica, or the holders in turn."""
    table = np.zeros(holds.shape, dtype=np.int64)
    for expert in range(holds.shape[1]):
        holders, away = np.flatnonzero(holds[:, expert]), 0
        for rank in range(len(holds)):
            table[rank, expert] = rank if holds[rank, expert] else holders[away % len(holders)]
            away += not holds[rank, expert]
    return table


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 20), st.integers(0, 20))
def test_holders_compute_and_the_choice_depends_on_nothing_else(
    seed: int, workers: int, experts: int, replicas: int
) -> None:
    tokens, holds = case(seed, workers, experts, replicas)
    ranks = ReplicaChoice(holds).ranks(tokens)
    assert holds[ranks, np.arange(experts)[None, :]].all()
    assert np.array_equal(ranks, ReplicaChoice(holds.copy()).ranks(tokens.copy()))


def test_the_busiest_worker_has_less_than_where_replicas_are_taken_in_turn() -> None:
    ours, turns = 0.0, 0.0
    for seed in range(40):
        tokens, holds = case(seed, 6, 24, 24)
        ours += busiest(tokens, ReplicaChoice(holds).ranks(tokens))
        turns += busiest(tokens, in_turn(holds))
    assert ours < 0.9 * turns


def test_an_expert_goes_whole_to_the_replica_whose_worker_has_least() -> None:
    holds = np.array([[True, False, True], [False, True, True]])
    tokens = np.array([[9, 1, 2], [9, 1, 2]])
    assert ReplicaChoice(holds).ranks(tokens).tolist() == [[0, 1, 1], [0, 1, 1]]


def test_an_expert_with_many_tokens_is_split_by_where_they_come_from() -> None:
    holds = np.array([[True, False, True], [False, True, True]])
    tokens = np.array([[1, 1, 50], [1, 1, 40]])
    assert ReplicaChoice(holds).ranks(tokens)[:, 2].tolist() == [0, 1], "each worker computes its own"


def test_without_replicas_the_holders_compute() -> None:
    holds = np.eye(4, dtype=bool)
    choice = ReplicaChoice(holds)
    assert not len(choice.replicated)
    assert choice.ranks(np.ones((4, 4), dtype=np.int64)).tolist() == [[0, 1, 2, 3]] * 4
