"""Blocks of layers with a sliding window: which ones a request holds, reserves and finds again. That no block within a
window is ever written to by another request is shown under random events, in test_random.py."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from elastic_moe.actors.caches.kv_blocks import BlockPool
from elastic_moe.actors.caches.windows import Windows
from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.messages.epochs import WindowRoom, window_blocks
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, SamplingParams
from elastic_moe.cluster.messages.seats import LiveBlocks
from elastic_moe.cluster.messages.steps import WindowBlocks
from tests.actors.batches import A, Plans, answers, plan, step

TOKENS = 8
ONE = window_blocks(TOKENS, steps_in_flight=2, block_size=4)


def windowed(blocks: int = 40, kv_blocks: int = 64, **changes: int) -> Scheduler:
    settings = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128} | changes
    rooms = {A: WindowRoom(tokens=TOKENS, blocks=blocks)}
    return Scheduler({A: kv_blocks}, **settings, eos_token_ids=(0,), window_rooms=rooms)


def ask(name: str, prompt: Iterable[int], **params: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(name),
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**({"max_tokens": 1} | params)),
    )


def windows(s: Scheduler) -> Windows:
    found = s._caches.by_worker[A].windows
    assert found is not None
    return found


def told(plans: Plans) -> list[WindowBlocks | None]:
    return [chunk.windows for chunk in plans[A].chunks]


def serve(s: Scheduler, request: GenerateRequest) -> int:
    """Run it to its end. Returns the tokens that it found cached."""
    s.add(request)
    while True:
        for output in step(s):
            if output.finish_reason is not None:
                return output.cached_tokens


def test_blocks_before_the_window_are_given_back_when_what_read_them_is_committed() -> None:
    s = windowed(max_num_batched_tokens=16)
    s.add(ask("a", range(1, 41)))
    first, second = plan(s), plan(s)
    [begin], [more] = told(first), told(second)
    assert begin is not None
    assert more is not None
    assert (begin.first, len(begin.ids)) == (0, 4)
    assert (more.first, len(more.ids)) == (0, 8), "the first step may be run again"
    s.commit(answers(first))
    s.validate()
    [last] = told(plan(s))
    assert last is not None
    # 16 tokens are committed: the next one reads those from place 9 on, in block 2
    assert (last.first, len(last.ids)) == (2, 8)
    assert last.ids[:6] == more.ids[2:]


def test_a_request_that_decodes_says_only_what_is_new() -> None:
    s = windowed()
    s.add(ask("a", range(1, 8), max_tokens=60))
    step(s)
    growth = []
    for _ in range(40):
        plans = plan(s)
        growth += [(number, blocks) for number, blocks in enumerate(told(plans)) if blocks is not None]
        s.commit(answers(plans))
        [request] = s._caches.by_worker[A].running.items
        assert request.window is not None
        assert len(request.window.blocks) <= 3
    assert [blocks.first for _, blocks in growth] == list(range(2, 12))
    assert {len(blocks.ids) for _, blocks in growth} == {1}


def test_requests_reserve_what_they_hold_while_they_decode() -> None:
    s = windowed(blocks=2 * ONE + 2)
    for name in "abc":
        s.add(ask(name, range(1, 10), max_tokens=40))
    s.add(ask("short", range(1, 3), max_tokens=4))
    step(s)
    step(s)
    # the third does not fit yet, while the short one needs no more than its own length
    assert [request.request_id for request in s._caches.by_worker[A].running.items] == ["a", "b"]
    assert s._book.waiting.items[0].claim == A
    assert s.status().kv_usage[A] == 2 * ONE / (2 * ONE + 2)
    while s.num_requests:
        step(s)
    assert windows(s).spare == 2 * ONE + 2


def test_a_prompt_is_cut_where_blocks_are_short_and_always_goes_on() -> None:
    s = windowed(blocks=ONE)
    s.add(ask("a", range(1, 101)))
    lengths = []
    while s.num_requests:
        plans = plan(s)
        lengths += [chunk.length for chunk in plans[A].chunks]
        s.commit(answers(plans))
    assert sum(lengths) == 100
    assert max(lengths) <= 4 * ONE
    assert min(lengths[:-1]) > 2


def test_a_request_of_which_one_never_fits_is_not_accepted() -> None:
    s = windowed(blocks=ONE - 1)
    with pytest.raises(Exception, match="no worker's KV cache holds more"):
        s.add(ask("a", range(1, 41)))


@pytest.mark.parametrize(("shared", "cached"), [(40, 40), (30, 28), (9, 8), (3, 0)])
def test_a_prefix_is_found_where_its_window_is(shared: int, cached: int) -> None:
    s = windowed()
    serve(s, ask("first", range(1, 42)))
    assert serve(s, ask("again", [*range(1, 1 + shared), 99, 98])) == cached


def test_a_prefix_is_as_long_as_both_kinds_of_blocks_allow() -> None:
    s = windowed(blocks=ONE + 10)
    serve(s, ask("first", range(1, 42)))
    # what the window has passed is overwritten before the end of the prompt is, from its last block on
    serve(s, ask("other", range(200, 245)))
    assert serve(s, ask("middle", range(1, 24))) == 4
    assert serve(s, ask("again", range(1, 42))) == 40


def test_what_a_window_has_passed_is_overwritten_first() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.publish(block, bytes([block]))
    pool.free(blocks[:1])
    pool.free(blocks[1:2], passed=True)
    pool.free(blocks[2:])
    pool.validate([])
    assert pool.allocate(3) == [blocks[1], blocks[0], blocks[2]]


def test_a_retired_key_is_found_no_more() -> None:
    pool = BlockPool(3)
    held, passed, idle = pool.allocate(3)
    for block in (held, passed, idle):
        pool.publish(block, bytes([block]))
    pool.free([passed], passed=True)
    pool.free([idle])
    pool.retire([bytes([block]) for block in (held, passed, idle, 77)])
    pool.validate([held])
    assert pool.find([bytes([held])]) == pool.find([bytes([passed])]) == []
    assert pool.num_free == 2


def test_a_cut_gives_back_the_blocks_of_what_was_in_flight() -> None:
    s = windowed()
    s.add(ask("a", range(1, 41), max_tokens=30))
    plan(s), plan(s)
    s.rollback()
    s.validate()
    assert windows(s).pool.num_free == 40
    while s.num_requests:
        step(s)
    assert windows(s).pool.num_free == 40


def test_a_worker_keeps_the_blocks_that_may_still_be_read() -> None:
    live = LiveBlocks()
    live.put(WindowBlocks(first=0, ids=(5, 6, 7)))
    live.drop_before(1)
    live.put(WindowBlocks(first=3, ids=(8,)))
    assert (live.first, live.ids) == (1, [6, 7, 8])
    live.put(WindowBlocks(first=2, ids=(9,)))
    assert (live.first, live.ids) == (1, [6, 9])
    # a step is run again that reads further back, or a sequence has gone on elsewhere
    live.put(WindowBlocks(first=0, ids=(5, 6)))
    assert (live.first, live.ids) == (0, [5, 6])
    live.put(WindowBlocks(first=9, ids=(1,)))
    assert (live.first, live.ids) == (9, [1])
    live.drop_before(4)
    assert (live.first, live.ids) == (9, [1])
