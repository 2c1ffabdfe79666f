"""No other deal of a step's misses ends sooner, and experts stay at home where that costs nothing."""

from itertools import product
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.optimizer.buffering.dealing import deal


def ends(ranks: tuple[int, ...] | list[int], fetch_s: list[float]) -> float:
    return max(ranks.count(rank) * each for rank, each in enumerate(fetch_s) if rank in ranks)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_no_other_deal_ends_sooner(homes: list[int], fetch_s: list[int]) -> None:
    ranks = deal(range(len(homes)), homes, fetch_s)
    assert ends(ranks, fetch_s) == min(ends(others, fetch_s) for others in product(range(3), repeat=len(homes)))


def test_an_expert_stays_at_home_among_equals() -> None:
    assert deal([0, 1, 2], [2, 2, 0], [1.0, 1.0, 1.0]) == [2, 0, 1]
    assert deal([3, 1], [0, 1, 2, 2], [1.0, 1.0, 1.0]) == [2, 1]


def test_a_rank_that_fetches_nothing_gets_nothing() -> None:
    assert deal([0, 1, 2], [0, 0, 0], [inf, 1.0, 1.0]) == [1, 2, 1]
