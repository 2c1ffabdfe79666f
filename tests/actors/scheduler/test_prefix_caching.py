"""Prefix caching, event by event. That a block never holds another text than the one it is known for is shown under
random events, in test_batching_random.py."""

from __future__ import annotations

import pytest

from elastic_moe.actors.caches.kv_blocks import BlockPool, next_key, root_key
from elastic_moe.actors.scheduler.admission import RUNNING_TOKENS
from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, SamplingParams
from elastic_moe.cluster.placement import WorkerId
from tests.actors.batches import A, B, answers, ids, plan, scheduler, step


def caching(workers: dict[WorkerId, int], **changes: int) -> Scheduler:
    return scheduler(workers, enable_prefix_caching=True, **({"max_num_batched_tokens": 64} | changes))


def ask(name: str, prompt: range, salt: str = "", **params: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(name),
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**({"max_tokens": 2} | params)),
        cache_salt=salt,
    )


def serve(s: Scheduler, request: GenerateRequest) -> int:
    """Run it to its end. Returns the tokens that it found cached."""
    s.add(request)
    while True:
        for output in step(s):
            if output.finish_reason is not None:
                return output.cached_tokens


# --- What is shared ---------------------------------------------------------------------------------------------


def test_full_blocks_of_a_finished_request_are_found_again() -> None:
    s = caching({A: 16})
    assert serve(s, ask("first", range(1, 11))) == 0
    s.add(ask("again", range(1, 11)))
    plans = plan(s)
    (chunk,) = plans[A].chunks
    assert (chunk.start, chunk.length, chunk.block_offset) == (8, 2, 0)
    assert len(chunk.block_ids) == 3
    assert s.commit(answers(plans))[0].cached_tokens == 8
    assert (s.status().prefix_queries, s.status().prefix_hits) == (20, 8)


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (14, 8)])
def test_the_last_token_is_always_computed(length: int, cached: int) -> None:
    s = caching({A: 16})
    serve(s, ask("first", range(1, 11)))
    assert serve(s, ask("again", range(1, 1 + length))) == cached


def test_the_answer_is_cached_as_well() -> None:
    """A conversation's next turn begins with the last one's prompt and answer."""
    s = caching({A: 16})
    serve(s, ask("first", range(1, 7), max_tokens=7))
    turn = GenerateRequest(
        request_id=RequestId("next"),
        prompt_token_ids=(*range(1, 7), *[7] * 7, 1, 2, 3),
        params=SamplingParams(max_tokens=1),
    )
    # the last token of an answer is never computed
    assert serve(s, turn) == 12


def test_a_difference_ends_the_shared_prefix() -> None:
    s = caching({A: 16})
    serve(s, ask("first", range(1, 11)))
    other = GenerateRequest(
        request_id=RequestId("other"),
        prompt_token_ids=(1, 2, 3, 4, 9, 6, 7, 8, 9, 10),
        params=SamplingParams(max_tokens=1),
    )
    assert serve(s, other) == 4


def test_salts_do_not_share() -> None:
    s = caching({A: 16})
    serve(s, ask("first", range(1, 11), salt="mine"))
    assert serve(s, ask("other", range(1, 11))) == 0
    assert serve(s, ask("again", range(1, 11), salt="mine")) == 8


def test_prompts_with_other_rotary_embeddings_do_not_share() -> None:
    s = Scheduler(
        {A: 32},
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=64,
        eos_token_ids=(),
        rope_limits=(20,),
    )
    serve(s, ask("short", range(1, 20)))
    assert serve(s, ask("long", range(1, 30))) == 0
    assert serve(s, ask("another long", range(1, 25))) == 24 - 4
    assert serve(s, ask("short again", range(1, 20))) == 16


def test_long_prompts_share_with_those_of_their_length_where_rotary_embeddings_grow() -> None:
    s = Scheduler(
        {A: 32},
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=64,
        eos_token_ids=(),
        rope_growth_limit=20,
    )
    serve(s, ask("short", range(1, 21)))
    assert serve(s, ask("another short", range(1, 19))) == 16
    assert serve(s, ask("long", range(1, 30))) == 0
    assert serve(s, ask("longer", range(1, 31))) == 0
    assert serve(s, ask("long again", range(1, 30))) == 28


def test_running_requests_share_blocks() -> None:
    s = caching({A: 16})
    s.add(ask("first", range(1, 10), max_tokens=8))
    step(s)
    s.add(ask("second", range(1, 10), max_tokens=8))
    plans = plan(s)
    # two of three blocks are the first one's
    assert s.status().kv_usage == {A: 4 / 16}
    s.commit(answers(plans))
    s.abort(RequestId("first"))
    s.validate()
    assert s.status().kv_usage == {A: 3 / 16}


def test_nothing_is_shared_without_prefix_caching() -> None:
    s = scheduler({A: 16}, enable_prefix_caching=False)
    serve(s, ask("first", range(1, 11)))
    assert serve(s, ask("again", range(1, 11))) == 0
    assert s.status().prefix_queries == 0


# --- When -------------------------------------------------------------------------------------------------------


def test_nothing_of_a_step_is_known_before_its_commit() -> None:
    s = caching({A: 16})
    s.add(ask("first", range(1, 11)))
    s.add(ask("beside it", range(1, 11)))
    plans = plan(s)
    assert [chunk.start for chunk in plans[A].chunks] == [0, 0]
    s.rollback()
    s.abort(RequestId("first"))
    s.add(ask("after", range(1, 11)))
    plans = plan(s)
    assert [chunk.start for chunk in plans[A].chunks] == [0, 0]
    assert {output.cached_tokens for output in s.commit(answers(plans))} == {0}


def test_a_request_aborted_during_its_step_leaves_nothing() -> None:
    s = caching({A: 16})
    s.add(ask("first", range(1, 11)))
    plans = plan(s)
    s.abort(RequestId("first"))
    s.commit(answers(plans))
    s.validate()
    assert serve(s, ask("again", range(1, 11))) == 0


def test_cached_tokens_are_reported_after_a_rollback_and_a_repeated_step() -> None:
    s = caching({A: 16})
    serve(s, ask("first", range(1, 11)))
    s.add(ask("again", range(1, 11)))
    before = plan(s)[A].chunks
    s.rollback()
    assert plan(s)[A].chunks == before


def test_a_preempted_request_finds_what_is_left_of_it() -> None:
    s = caching({A: 6})
    s.add(ask("old", range(1, 9), max_tokens=12))
    s.add(ask("new", range(20, 28), max_tokens=6))
    while not s.status().preemptions:
        step(s)
    while s.status().running[A] == 1 and s.num_requests == 2:
        step(s)
    plans = plan(s)
    (chunk,) = plans[A].chunks
    assert chunk.request_id == "new"
    # its last blocks were overwritten first
    assert chunk.start == 4
    s.commit(answers(plans))


def test_a_worker_that_comes_back_has_cached_nothing() -> None:
    s = caching({A: 16})
    serve(s, ask("first", range(1, 11)))
    s.set_workers({})
    s.set_workers({A: 16})
    assert serve(s, ask("again", range(1, 11))) == 0


# --- What is overwritten ----------------------------------------------------------------------------------------


def test_the_least_recently_used_are_overwritten_first() -> None:
    s = caching({A: 8})
    serve(s, ask("a", range(1, 10)))
    serve(s, ask("b", range(11, 20)))
    serve(s, ask("a again", range(1, 10)))
    # 2 + 2 blocks are known, and this takes 5 of the 8
    serve(s, ask("large", range(30, 48)))
    assert serve(s, ask("a", range(1, 10))) == 8
    assert serve(s, ask("b", range(11, 20))) == 4


def test_cached_blocks_can_be_allocated() -> None:
    s = caching({A: 8})
    serve(s, ask("first", range(1, 31)))
    assert s.status().kv_usage == {A: 0.0}
    assert serve(s, ask("second", range(31, 61))) == 0


def test_a_pool_counts_references() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    key = next_key(root_key(salt="", variant=0), [1, 2])
    pool.publish(first, key)
    pool.publish(second, key)
    assert pool.find([key]) == [first], "the first stays the known one"
    pool.hold([first])
    pool.free([first, second])
    pool.validate([first])
    assert pool.num_free == 3
    pool.free([first])
    assert pool.find([key]) == [first]
    assert first not in pool.allocate(3)
    assert pool.allocate(1) == [first]
    assert pool.find([key]) == []


# --- Where a request goes ---------------------------------------------------------------------------------------


def test_a_request_follows_its_prefix() -> None:
    s = caching({A: 64, B: 64})
    serve(s, ask("warm", range(1, 10)))
    s.add(ask("elsewhere", range(40, 44), max_tokens=50))
    s.add(ask("other", range(50, 54), max_tokens=50))
    plans = plan(s)
    s.commit(answers(plans))
    assert (ids(plans, A), ids(plans, B)) == (["elsewhere"], ["other"])
    s.add(ask("again", range(1, 30)))
    plans = plan(s)
    assert ids(plans, A) == ["elsewhere", "again"]


def test_a_request_leaves_its_prefix_where_more_run() -> None:
    prompt = range(1, RUNNING_TOKENS + 30)
    s = caching({A: 9999, B: 9999}, max_model_len=4096, max_num_batched_tokens=512)
    serve(s, ask("warm", prompt))
    for i in range(3):
        s.add(ask(f"r{i}", prompt, max_tokens=50))
        plans = plan(s)
        s.commit(answers(plans))
    # the cache is worth one request more
    assert (ids(plans, A), ids(plans, B)) == (["r0", "r1"], ["r2"])
