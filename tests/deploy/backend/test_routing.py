"""Which group a request goes to: the longest known prefix, then the least load, among groups that serve."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.deploy.backend.routing import (
    BUSIER,
    CHUNK,
    MOST_TOKENS,
    SLACK,
    GroupState,
    KnownPrefixes,
    by_name,
    choose,
    chunk_keys,
)

STATES = st.lists(
    st.builds(GroupState, serves=st.booleans(), requests=st.integers(0, 200), workers=st.integers(1, 8)),
    min_size=1,
    max_size=5,
)


def states(*requests: int | None) -> list[GroupState]:
    """None: the group does not serve."""
    return [GroupState(serves=number is not None, requests=number or 0) for number in requests]


def test_the_longest_prefix_comes_before_the_load_and_the_load_before_the_number() -> None:
    assert choose(states(3, 2, 3), [32, 0, 64]).value == 2
    assert choose(states(3, 2, 3), [0, 0, 0]).value == 1
    assert choose(states(2, 2, 2), [0, 0, 0]).value == 0
    assert choose(states(3, 3, 2), [32, 32, 32]).value == 2
    assert "32 tokens" in choose(states(1, 1), [0, 32]).reason


def test_load_is_counted_for_each_worker() -> None:
    big = GroupState(serves=True, requests=8, workers=4)
    assert choose([GroupState(serves=True, requests=3), big], [0, 0]).value == 1


def test_a_prefix_does_not_pile_all_requests_on_one_group() -> None:
    assert choose(states(4, 0), [640, 0]).value == 0
    assert choose(states(5, 0), [640, 0]).value == 1
    assert choose(states(34, 20), [640, 0]).value == 0
    assert choose(states(35, 20), [640, 0]).value == 1


def test_groups_that_do_not_serve_get_nothing() -> None:
    assert choose(states(None, 9, 10), [99, 0, 0]).value == 1
    assert choose(states(None, None), [1, 1]).value is None
    assert by_name(states(None, None), "r").value is None


@given(STATES, st.data())
def test_the_choice_serves_and_is_not_far_busier_than_the_least_busy(
    groups: list[GroupState], data: st.DataObject
) -> None:
    known = data.draw(st.lists(st.integers(0, 999), min_size=len(groups), max_size=len(groups)))
    best = choose(groups, known).value
    serving = [group for group in groups if group.serves]
    if best is None:
        assert not serving
        return
    assert groups[best].serves
    bound = BUSIER * min(group.load for group in serving) + SLACK
    assert groups[best].load <= bound
    better = [n for n, group in enumerate(groups) if group.serves and group.load <= bound and known[n] > known[best]]
    assert not better


@given(STATES, st.lists(st.text(max_size=8), min_size=1, max_size=8), st.data())
def test_by_name_only_the_requests_of_a_lost_group_move(
    groups: list[GroupState], names: Sequence[str], data: st.DataObject
) -> None:
    lost = data.draw(st.integers(0, len(groups) - 1))
    left = [GroupState(serves=g.serves and n != lost, requests=0) for n, g in enumerate(groups)]
    for name in names:
        before, after = by_name(groups, name).value, by_name(left, name).value
        assert after == before if before != lost else after != lost


def test_keys_tell_prefixes_apart_from_the_beginning_and_by_salt() -> None:
    tokens = tuple(range(3 * CHUNK + 5))
    keys = chunk_keys(tokens, "")
    assert len(keys) == 3
    assert chunk_keys(tokens[: 2 * CHUNK] + (7,) * CHUNK, "")[:2] == keys[:2]
    assert chunk_keys(tokens[: 2 * CHUNK] + (7,) * CHUNK, "")[2] != keys[2]
    assert not set(keys) & set(chunk_keys((9, *tokens[1:]), ""))
    assert not set(keys) & set(chunk_keys(tokens, "salt"))
    assert len(chunk_keys(range(MOST_TOKENS + 999), "")) == MOST_TOKENS // CHUNK
    assert chunk_keys(tokens[: CHUNK - 1], "") == []


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), min_size=1, max_size=5)), max_size=12))
def test_what_is_known_is_the_longest_prefix_that_a_group_was_given(sent: list[tuple[int, list[int]]]) -> None:
    """Sequences of chunks of two kinds, against a search of everything that was sent."""
    prefixes = KnownPrefixes(3)
    for group, kinds in sent:
        prefixes.learn(chunk_keys([kind for kind in kinds for _ in range(CHUNK)], ""), group)
    for _, kinds in sent:
        expected = [0, 0, 0]
        for group, others in sent:
            same = next((n for n, (a, b) in enumerate(zip(kinds, others, strict=False)) if a != b), None)
            same = min(len(kinds), len(others)) if same is None else same
            expected[group] = max(expected[group], CHUNK * same)
        assert prefixes.known(chunk_keys([kind for kind in kinds for _ in range(CHUNK)], "")) == expected


def test_a_group_that_was_lost_knows_nothing_and_the_oldest_chunks_are_forgotten() -> None:
    prefixes = KnownPrefixes(2, most=4)
    one, two = chunk_keys((1,) * 3 * CHUNK, ""), chunk_keys((2,) * 2 * CHUNK, "")
    prefixes.learn(one, 0)
    prefixes.learn(one[:2], 1)
    assert prefixes.known(one) == [3 * CHUNK, 2 * CHUNK]
    prefixes.forget(0)
    assert prefixes.known(one) == [0, 2 * CHUNK]
    prefixes.learn(two, 0)
    assert prefixes.known(two) == [2 * CHUNK, 0]
    assert len(prefixes) == 4
    prefixes.learn(chunk_keys((3,) * CHUNK, ""), 0)
    assert (len(prefixes), prefixes.known(one)) == (4, [0, 0])
