"""Places for requests that wait: bounded, and never all one client's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.generation.places import Places


def test_a_client_leaves_room_for_others() -> None:
    places = Places(100)
    places.take("a", 60)
    with pytest.raises(RequestError, match="60 of at most 100, and 60 of them are yours") as refused:
        places.take("a", 20)
    assert refused.value.status == 503
    taken = places.take("b", 15)
    places.take("c", 5)
    taken.give_back(10)
    assert places.taken == 70
    taken.give_back()
    taken.give_back()
    assert places.taken == 65


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(RequestError, match="at most 4") as refused:
        Places(4).take("a", 5)
    assert (refused.value.status, refused.value.param) == (400, "n")
    Places(4).take("a", 4)


@given(st.integers(20, 500), st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), max_size=80))
def test_the_next_request_finds_room(most: int, asked: list[tuple[str, int]]) -> None:
    """While fewer clients than it takes to fill it, each with a quarter of what is left, ask for single answers."""
    places = Places(most)
    for client, _ in asked * 20:
        try:
            places.take(client, 1)
        except RequestError:
            continue
    assert places.taken <= most
    if most >= 100:
        places.check("newcomer", 1)
