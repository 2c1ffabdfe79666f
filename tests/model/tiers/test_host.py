"""The host tier: what is placed there comes, what is not leaves, and the cores compute what they have done sooner."""

from __future__ import annotations

import threading

import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.model.record_layout import PAGE
from elastic_moe.model.tiers.host import HostTier, computed_by_host
from elastic_moe.model.tiers.slots import Slot

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 40), max_size=12), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_split_is_the_soonest_of_all(tokens: list[int], fetch_s: float, token_s: float) -> None:
    tokens.sort(reverse=True)

    def done(count: int) -> float:
        return max((len(tokens) - count) * fetch_s, token_s * sum(tokens[len(tokens) - count :]))

    count = computed_by_host(tokens, fetch_s, token_s)
    assert done(count) <= min(map(done, range(len(tokens) + 1))) * (1 + 1e-9)


def test_one_token_is_computed_where_it_is_sooner() -> None:
    assert computed_by_host([1], fetch_s=2.0, token_s=1.0) == 1
    assert computed_by_host([1], fetch_s=1.0, token_s=2.0) == 0
    assert computed_by_host([9, 1, 1], fetch_s=2.0, token_s=1.0) == 2


def write(layer: int, expert: int, slot: Slot) -> None:
    slot.data.fill_(16 * layer + expert)


def test_placed_experts_come_and_others_leave() -> None:
    host = HostTier(capacity=3, slot_bytes=PAGE, device=CPU, read=write)
    host.place([{1, 2}, {5}])
    assert host.filled(10)
    first = {pair: host.get(*pair) for pair in ((0, 1), (0, 2), (1, 5))}
    for (layer, expert), slot in first.items():
        assert slot is not None
        assert slot.data.unique().tolist() == [16 * layer + expert]
    host.place([{2, 3}, {5}])
    assert host.filled(10)
    assert host.get(0, 1) is None
    assert host.get(0, 2) is first[0, 2]
    assert host.get(0, 3) is first[0, 1], "the memory of what left is used again"
    host.place([range(8), ()])
    assert host.filled(10)
    assert sum(host.has(0, expert) for expert in range(8)) == 3, "no more than its capacity"
    host.close()


def test_an_expert_that_cannot_be_read_stays_on_the_disk() -> None:
    def read(layer: int, expert: int, slot: Slot) -> None:
        if expert == 1:
            raise CheckpointError("shard 3 is damaged")
        write(layer, expert, slot)

    host = HostTier(capacity=4, slot_bytes=PAGE, device=CPU, read=read)
    host.place([{0, 1, 2}])
    assert host.filled(10)
    assert [host.has(0, expert) for expert in range(3)] == [True, False, True]
    host.close()


def test_what_an_epoch_no_longer_wants_does_not_come() -> None:
    reading, go_on = threading.Event(), threading.Event()

    def read(layer: int, expert: int, slot: Slot) -> None:
        reading.set()
        assert go_on.wait(10)
        write(layer, expert, slot)

    host = HostTier(capacity=1, slot_bytes=PAGE, device=CPU, read=read)
    host.place([{0}])
    assert reading.wait(10)
    host.place([{7}])
    go_on.set()
    assert host.filled(10)
    assert (host.has(0, 0), host.has(0, 7)) == (False, True)
    host.close()
