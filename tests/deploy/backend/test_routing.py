"""Which group a request goes to: the longest known prefix, then the least load, among groups that serve."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.deploy.backend.routing import (
    BUSIER,
    CHUNK,
    MOST_TOKENS,
    SLACK,
    GroupState,
    KnownPrefixes,
    Loads,
    Report,
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


def test_the_longest_prefix_comes_before_the_load_and_the_load_before_the_name() -> None:
    assert choose(states(3, 2, 3), [32, 0, 64], "r").value == 2
    assert choose(states(3, 2, 3), [0, 0, 0], "r").value == 1
    assert choose(states(3, 3, 2), [32, 32, 32], "r").value == 2
    assert "32 tokens" in choose(states(1, 1), [0, 32], "r").reason
    names = [f"r{n}" for n in range(30)]
    assert {choose(states(2, 2, 2), [0, 0, 0], name).value for name in names} == {0, 1, 2}
    assert {choose(states(2, 3, 2), [0, 0, 0], name).value for name in names} == {0, 2}


def test_load_is_counted_for_each_worker() -> None:
    big = GroupState(serves=True, requests=8, workers=4)
    assert choose([GroupState(serves=True, requests=3), big], [0, 0], "r").value == 1


def test_a_prefix_does_not_pile_all_requests_on_one_group() -> None:
    assert choose(states(4, 0), [640, 0], "r").value == 0
    assert choose(states(5, 0), [640, 0], "r").value == 1
    assert choose(states(34, 20), [640, 0], "r").value == 0
    assert choose(states(35, 20), [640, 0], "r").value == 1


def test_groups_that_do_not_serve_get_nothing() -> None:
    assert choose(states(None, 9, 10), [99, 0, 0], "r").value == 1
    assert choose(states(None, None), [1, 1], "r").value is None
    assert by_name(states(None, None), "r").value is None


@given(STATES, st.data())
def test_the_choice_serves_and_is_not_far_busier_than_the_least_busy(
    groups: list[GroupState], data: st.DataObject
) -> None:
    known = data.draw(st.lists(st.integers(0, 999), min_size=len(groups), max_size=len(groups)))
    best = choose(groups, known, "r").value
    serving = [group for group in groups if group.serves]
    if best is None:
        assert not serving
        return
    assert groups[best].serves
    bound = BUSIER * min(group.load for group in serving) + SLACK
    assert groups[best].load <= bound
    better = [n for n, group in enumerate(groups) if group.serves and group.load <= bound and known[n] > known[best]]
    assert not better


class Replica:
    """One API replica, which is told of the others' requests only when `hears`."""

    def __init__(self, groups: int) -> None:
        self.loads = Loads()
        self.prefixes = KnownPrefixes(groups)
        self.own: list[set[str]] = [set() for _ in range(groups)]

    def place(self, name: str, prompt: Sequence[int] = ()) -> None:
        keys = chunk_keys(prompt, "")
        states = [self.loads.state(n, len(own), serves=True) for n, own in enumerate(self.own)]
        best = choose(states, self.prefixes.known(keys), name).value
        assert best is not None
        self.loads.placed(best, name)
        self.prefixes.learn(keys, best)
        self.own[best].add(name)

    def hears(self, totals: Sequence[int], replicas: int) -> None:
        for number, total in enumerate(totals):
            counted = self.loads.asked(number)
            report = Report(others=total - len(self.own[number]), replicas=replicas)
            self.loads.told(number, report, counted)

    def ends(self, name: str) -> None:
        for number, own in enumerate(self.own):
            if name in own:
                own.remove(name)
                self.loads.left(number, name)


def totals_of(replicas: Sequence[Replica]) -> list[int]:
    return [sum(map(len, owned)) for owned in zip(*(replica.own for replica in replicas), strict=True)]


def tell(replicas: Sequence[Replica], *, before: Sequence[int] | None = None) -> None:
    """A second has passed. before: requests of others still in each group."""
    totals = [a + b for a, b in zip(totals_of(replicas), before or [0] * len(replicas[0].own), strict=True)]
    for replica in replicas:
        replica.hears(totals, len(replicas))


@pytest.mark.parametrize("num_replicas", [1, 8])
@pytest.mark.parametrize("each", [1, 3, 20])
@pytest.mark.parametrize("groups", [2, 4])
def test_a_burst_between_two_reports_is_spread_over_groups(num_replicas: int, each: int, groups: int) -> None:
    replicas = [Replica(groups) for _ in range(num_replicas)]
    tell(replicas)
    for n in range(each):
        for number, replica in enumerate(replicas):
            replica.place(f"{n} of {number}")
    totals = totals_of(replicas)
    # where each replica gives one group one request more, that group is drawn: it is not the same for all
    assert max(totals) - min(totals) <= max(1, num_replicas - 1), totals


@pytest.mark.parametrize("num_replicas", [1, 2, 8])
def test_a_group_that_joins_is_filled_and_not_flooded(num_replicas: int) -> None:
    before, burst = [24, 0], 16 // num_replicas
    replicas = [Replica(2) for _ in range(num_replicas)]
    tell(replicas, before=before)
    for second in range(8):
        for n in range(burst):
            for number, replica in enumerate(replicas):
                replica.place(f"{second} {n} of {number}")
        assert totals_of(replicas)[1] <= before[0] + totals_of(replicas)[0] + num_replicas, "it is not flooded"
        tell(replicas, before=before)
    first, second = (a + b for a, b in zip(totals_of(replicas), before, strict=True))
    assert abs(first - second) <= num_replicas


def test_a_burst_of_one_prompt_stays_together_only_as_far_as_all_replicas_together_may() -> None:
    prompt = tuple(range(2 * CHUNK))
    replicas = [Replica(2) for _ in range(4)]
    tell(replicas)
    for replica in replicas:
        replica.prefixes.learn(chunk_keys(prompt, ""), 0)
    for n in range(5):
        for number, replica in enumerate(replicas):
            replica.place(f"{n} of {number}", prompt)
    first, second = totals_of(replicas)
    assert first <= BUSIER * second + SLACK + len(replicas)


def test_only_what_a_report_may_lack_is_taken_for_others_too() -> None:
    replica = Replica(1)
    replica.hears([0], 3)

    def load() -> float:
        return replica.loads.state(0, len(replica.own[0]), serves=True).load

    replica.place("a")
    replica.place("b")
    assert load() == 6
    replica.ends("a")
    assert load() == 3
    counted = replica.loads.asked(0)
    replica.place("c")
    # it was asked before "c" came
    replica.loads.told(0, Report(others=5, replicas=3), counted)
    assert load() == 2 + 5 + 2
    replica.loads.forget(0)
    assert load() == 2


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
