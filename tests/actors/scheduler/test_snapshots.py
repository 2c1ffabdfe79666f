"""Snapshots of states: where a request goes on from one, which ones are taken, and that a step may be run again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic_moe.actors.caches.snapshots import SnapshotPool
from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.messages.epochs import StateRoom
from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, SamplingParams
from elastic_moe.cluster.messages.steps import Chunk, StepResult
from elastic_moe.cluster.placement import WorkerId
from tests.actors.batches import A, Plans, answers, plan, step

ROOM = StateRoom(seats=2, snapshots=3)


def hybrid(room: StateRoom = ROOM, blocks: int = 32, **changes: int) -> Scheduler:
    settings = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 64} | changes
    return Scheduler({A: blocks}, **settings, eos_token_ids=(0,), state_rooms={A: room})


def ask(name: str, *prompt: int, **params: object) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(name),
        prompt_token_ids=prompt,
        params=SamplingParams(**({"max_tokens": 1} | params)),  # type: ignore[arg-type]
    )


def chunk(plans: Plans, worker: WorkerId = A) -> Chunk:
    [only] = plans[worker].chunks
    return only


def saves(one: Chunk) -> list[int]:
    assert one.state is not None
    return [saved.position for saved in one.state.save]


def serve(s: Scheduler, request: GenerateRequest) -> Chunk:
    """Run a request of one chunk to its end. Returns the chunk."""
    s.add(request)
    plans = plan(s)
    s.commit(answers(plans))
    s.validate()
    while s.num_requests:
        step(s)
    return chunk(plans)


def test_no_more_requests_run_than_have_room_for_states() -> None:
    s = hybrid()
    for name in "abc":
        s.add(ask(name, 1, 2, 3, max_tokens=4))
    step(s)
    assert s.status().running == {A: 2}
    assert s.status().waiting == 1


def test_a_prompt_leaves_a_snapshot_after_its_last_full_block() -> None:
    s = hybrid()
    first = serve(s, ask("first", *range(1, 11)))
    assert (first.start, saves(first)) == (0, [8])
    again = serve(s, ask("again", *range(1, 11)))
    assert again.start == 8
    assert again.state is not None
    assert first.state is not None
    assert again.state.restore == first.state.save[0].place


def test_blocks_without_a_snapshot_are_computed_again() -> None:
    """The second prompt shares two blocks with the first, which has left a snapshot after its third. The third prompt
    profits."""
    s = hybrid()
    serve(s, ask("first", *range(1, 14)))
    second = serve(s, ask("second", *range(1, 9), 50, 51, 52, 53, 54))
    assert (second.start, saves(second)) == (0, [8, 12])
    third = serve(s, ask("third", *range(1, 9), 60, 61))
    assert third.start == 8


def test_an_answer_leaves_one_snapshot_after_its_last_full_block() -> None:
    s = hybrid(max_model_len=64)
    s.add(ask("first", 1, 2, 3, 4, 5, max_tokens=12))
    while s.num_requests:
        step(s)
    assert len(s._caches.by_worker[A].snapshots._places) == 2, "that of the prompt, and that of the answer"
    turn = serve(s, ask("next turn", 1, 2, 3, 4, 5, *[7] * 12, 8, 9))
    assert turn.start == 16


def test_a_snapshot_of_a_step_that_is_not_committed_is_not_found() -> None:
    s = hybrid()
    s.add(ask("first", *range(1, 11), max_tokens=2))
    plan(s)
    s.add(ask("second", *range(1, 11)))
    ahead = plan(s)
    assert [one.start for one in ahead[A].chunks] == [10, 0]
    s.rollback()
    s.validate()
    assert not s._caches.by_worker[A].snapshots._places
    plans = plan(s)
    assert [one.start for one in plans[A].chunks] == [0, 0]


def test_a_snapshot_stays_until_the_step_that_reads_it_is_committed() -> None:
    """Another request needs its place meanwhile, and gets none."""
    s = hybrid(StateRoom(seats=2, snapshots=1))
    serve(s, ask("first", *range(1, 11)))
    s.add(ask("again", *range(1, 11), max_tokens=2))
    reading = chunk(plan(s))
    s.add(ask("other", *range(20, 30)))
    ahead = plan(s)
    assert [saves(one) for one in ahead[A].chunks] == [[], []]
    s.rollback()
    both = {one.request_id: one for one in plan(s)[A].chunks}
    assert both[RequestId("again")].state == replace(reading.state, save=())  # type: ignore[type-var]


def test_states_are_kept_from_the_last_committed_step_on() -> None:
    s = hybrid()
    s.add(ask("one", 1, 2, 3, max_tokens=8))
    first = plan(s)
    second = plan(s)
    s.commit(answers(first))
    third = plan(s)
    kept = [chunk(plans).state for plans in (first, second, third)]
    assert [use.keep_from for use in kept if use is not None] == [0, 0, 3]


def test_a_chunk_whose_mask_is_late_runs_again_as_a_whole() -> None:
    """A state cannot be set back by one token."""
    grammar = Grammar(kind=GrammarKind.REGEX, text="a*")
    s = hybrid()
    s.add(ask("one", 1, 2, 3, 4, 5, max_tokens=8, grammar=grammar))
    plans = plan(s)
    late = StepResult(step=0, samples=(), compute_s=0.0, unready=(RequestId("one"),))
    assert not s.commit({A: late})
    s.validate()
    again = plan(s)
    assert chunk(again) == replace(chunk(plans))
    s.commit(answers(again))
    alone = plan(s)
    s.commit({A: replace(late, step=0)})
    s.validate()
    assert chunk(plan(s)).start == chunk(alone).start == 5, "a single token needs only the state before it"


def test_a_late_mask_behind_a_snapshot_restores_it_again() -> None:
    """The chunk is the one token behind the snapshot, and a step that goes on from it is in flight too."""
    s = hybrid()
    serve(s, ask("first", *range(1, 9), 50))
    s.add(ask("one", *range(1, 9), 51, max_tokens=8, grammar=Grammar(kind=GrammarKind.REGEX, text="a*")))
    restored = chunk(plan(s))
    plan(s)
    assert (restored.start, restored.length) == (8, 1)
    assert restored.state is not None
    assert restored.state.restore is not None
    late = StepResult(step=0, samples=(), compute_s=0.0, unready=(RequestId("one"),))
    assert not s.commit({A: late})
    s.validate()
    again = plan(s)
    assert chunk(again) == restored
    assert not s.commit({A: late})
    s.commit(answers(again))
    s.validate()
    assert chunk(plan(s)).start == 9


def test_states_of_a_damaged_request_are_not_shared() -> None:
    s = hybrid()
    s.add(ask("bad", *range(1, 11), max_tokens=4))
    step(s)
    plans = plan(s)
    s.commit({A: StepResult(step=0, samples=(), compute_s=0.0, corrupted=(RequestId("bad"),))})
    s.validate()
    assert plans
    assert serve(s, ask("good", *range(1, 11))).start == 0


@pytest.mark.parametrize("longest", [0, 1, 2])
def test_the_longest_known_prefix_is_found(longest: int) -> None:
    pool = SnapshotPool(2)
    keys = [b"a", b"b", b"c"]
    if longest:
        place = pool.write()
        assert place is not None
        assert pool.publish(place, keys[longest - 1])
    assert pool.longest(keys) == longest


def test_the_least_recently_used_is_overwritten_first() -> None:
    pool = SnapshotPool(2)
    places = {}
    for key in (b"old", b"new"):
        place = pool.write()
        assert place is not None
        pool.publish(place, key)
        places[key] = place
    pool.unpin(pool.pin(b"old"))
    assert pool.write() == places[b"new"]
    assert pool.longest([b"old"]) == 1
    pinned = pool.pin(b"old")
    assert pool.write() is None, "one is pinned, and the other is written to"
    pool.retire(b"old")
    pool.validate(pinned=[pinned], writing=[places[b"new"]])
    pool.unpin(pinned)
    assert pool.write() == places[b"old"]
