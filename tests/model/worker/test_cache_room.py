"""How a worker's memory for sequences is divided."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.messages.epochs import StateRoom, WindowRoom, window_blocks
from elastic_moe.model.worker.cache_room import CacheSizes, WindowSizes, divide

PLAIN = CacheSizes(block_bytes=100, blocks_per_sequence=8, max_num_seqs=4)
WINDOWS = WindowSizes(tokens=8, block_bytes=300, block_size=4, max_num_batched_tokens=8, steps_in_flight=2)
SLIDING = CacheSizes(block_bytes=100, blocks_per_sequence=50, max_num_seqs=4, windows=WINDOWS)
HYBRID = replace(PLAIN, state_bytes=500, states_per_sequence=3, snapshots=True)


def test_without_states_all_memory_is_for_blocks() -> None:
    assert divide(2050, PLAIN, max_model_len=64).blocks == 20
    assert divide(10**6, PLAIN, max_model_len=64).blocks == 32, "more are never needed"
    assert divide(800, PLAIN, max_model_len=64).states is None


@pytest.mark.parametrize(
    ("sizes", "least", "says"),
    [
        (PLAIN, 800, "needs 800 B of KV cache, 799 B are there"),
        (HYBRID, 2300, "needs 800 B of KV cache and 1.5 kB of states, 2.3 kB are there"),
    ],
)
def test_a_sequence_of_full_length_must_fit(sizes: CacheSizes, least: int, says: str) -> None:
    assert divide(least, sizes, max_model_len=64).blocks == 8
    with pytest.raises(UserError, match=f"max_model_len 64 {says}: .* raise --kv-cache-memory-bytes"):
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


def test_a_window_takes_the_same_however_long_a_sequence_may_be() -> None:
    # the window and tokens in flight on both sides are 3 blocks of 4; one is begun, one is for tokens behind a chunk
    assert WINDOWS.per_sequence == window_blocks(8, steps_in_flight=2, block_size=4) == 5
    assert WINDOWS.first == 5 + 4, "and two chunks of 8 tokens"
    for blocks in (50, 5000):
        assert replace(SLIDING, blocks_per_sequence=blocks).one == blocks * 100 + 9 * 300
    assert replace(SLIDING, blocks_per_sequence=6).one == 6 * 400, "a short sequence is never longer than itself"


def test_windows_get_what_lasts_as_long_as_the_other_blocks() -> None:
    least = divide(SLIDING.one, SLIDING, max_model_len=200)
    assert (least.blocks, least.windows) == (50, WindowRoom(tokens=8, blocks=9))
    # of a sequence of 200 tokens: 50 blocks of 100 bytes, and 5 of 300
    more = divide(SLIDING.one + 6500, SLIDING, max_model_len=200)
    assert (more.blocks, more.windows) == (50 + 50, WindowRoom(tokens=8, blocks=9 + 5))
    much = divide(10**6, SLIDING, max_model_len=200)
    assert (much.blocks, much.windows) == (200, WindowRoom(tokens=8, blocks=20))
    kept = divide(10**6, replace(SLIDING, snapshots=True), max_model_len=200)
    assert kept.windows == WindowRoom(tokens=8, blocks=100), "prefixes keep windows too"


def test_a_model_of_windows_alone_has_as_many_other_blocks_as_are_asked_for() -> None:
    sizes = replace(SLIDING, block_bytes=0)
    assert sizes.one == 9 * 300
    room = divide(sizes.one + 1000, sizes, max_model_len=200)
    assert (room.blocks, room.windows) == (200, WindowRoom(tokens=8, blocks=12))


@given(st.integers(0, 40_000), st.booleans(), st.booleans(), st.sampled_from([0, 100]))
def test_nothing_is_divided_twice_with_windows(more: int, snapshots: bool, states: bool, block_bytes: int) -> None:
    sizes = replace(SLIDING, snapshots=snapshots, block_bytes=block_bytes)
    if states:
        sizes = replace(sizes, state_bytes=500, states_per_sequence=3)
    room_bytes = sizes.one + sizes.seat_bytes + more
    room = divide(room_bytes, sizes, max_model_len=200)
    assert room.windows is not None
    taken = room.blocks * block_bytes + room.windows.blocks * 300
    if room.states is not None:
        taken += (room.states.seats * 3 + room.states.snapshots) * 500
    assert taken <= room_bytes
    assert room.blocks >= 50
    assert room.windows.blocks >= 9
