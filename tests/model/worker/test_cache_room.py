"""How a worker's memory for sequences is divided."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.messages.epochs import StateRoom
from elastic_moe.model.worker.cache_room import CacheSizes, divide

PLAIN = CacheSizes(block_bytes=100, blocks_per_sequence=8, max_num_seqs=4)
HYBRID = replace(PLAIN, state_bytes=500, states_per_sequence=3, snapshots=True)


def test_without_states_all_memory_is_for_blocks() -> None:
    assert divide(2050, PLAIN, max_model_len=64).blocks == 20
    assert divide(10**6, PLAIN, max_model_len=64).blocks == 32, "more are never needed"
    assert divide(800, PLAIN, max_model_len=64).states is None


@pytest.mark.parametrize(("sizes", "least"), [(PLAIN, 800), (HYBRID, 2300)])
def test_a_sequence_of_full_length_must_fit(sizes: CacheSizes, least: int) -> None:
    assert divide(least, sizes, max_model_len=64).blocks == 8
    with pytest.raises(UserError, match=r"max_model_len 64 needs .* raise --kv-cache-memory-bytes"):
        divide(least - 1, sizes, max_model_len=64)


def test_much_memory_gives_every_sequence_its_states() -> None:
    room = divide(10**6, HYBRID, max_model_len=64)
    assert (room.blocks, room.states) == (32, StateRoom(seats=4, snapshots=16))
    none = divide(10**6, replace(HYBRID, snapshots=False), max_model_len=64)
    assert none.states == StateRoom(seats=4, snapshots=0)


@given(st.integers(2300, 40_000), st.booleans())
def test_nothing_is_divided_twice(room_bytes: int, snapshots: bool) -> None:
    sizes = replace(HYBRID, snapshots=snapshots)
    room = divide(room_bytes, sizes, max_model_len=64)
    assert room.states is not None
    states = room.states.seats * sizes.states_per_sequence + room.states.snapshots
    assert room.blocks * sizes.block_bytes + states * sizes.state_bytes <= room_bytes
    assert room.blocks >= sizes.blocks_per_sequence
    assert 1 <= room.states.seats <= sizes.max_num_seqs
