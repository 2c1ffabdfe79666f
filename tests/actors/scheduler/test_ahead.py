"""Batching with two steps in flight, event by event. Random orders are in test_batching_random.py."""

from __future__ import annotations

from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.requests import FinishReason, RequestId
from elastic_moe.cluster.messages.steps import Chunk
from tests.actors.batches import EOS, A, B, Plans, answers, ids, plan, request, scheduler, try_plan


def chunk(plans: Plans, name: str) -> Chunk:
    return next(c for c in plans[A].chunks if c.request_id == name)


def in_flight(s: Scheduler) -> tuple[Plans, Plans]:
    return plan(s, 1), plan(s, 2)


def test_the_second_step_feeds_what_the_first_samples() -> None:
    s = scheduler({A: 10})
    s.add(request("r", prompt=4))
    first, second = in_flight(s)
    assert [new.request_id for new in first[A].new] == ["r"]
    assert not second[A].new, "it is told by then"
    assert (chunk(first, "r").start, chunk(first, "r").known) == (0, 4)
    c = chunk(second, "r")
    assert (c.start, c.length, c.known, c.samples) == (4, 1, 5, True)
    assert (c.block_offset, len(c.block_ids)) == (1, 1), "the token that is not known yet has its place"
    assert [o.token_ids for o in s.commit(answers(first, 7))] == [(7,)]
    s.validate()
    outputs = s.commit(answers(second, 8))
    assert (outputs[0].offset, outputs[0].token_ids) == (1, (8,))
    s.validate()


def test_an_end_by_length_is_known_ahead() -> None:
    s = scheduler({A: 10})
    s.add(request("short", max_tokens=1))
    s.add(request("long"))
    first, second = in_flight(s)
    assert ids(first, A) == ["short", "long"]
    assert ids(second, A) == ["long"]
    assert [o.finish_reason for o in s.commit(answers(first))] == [FinishReason.LENGTH, None]
    s.commit(answers(second))
    s.validate()


def test_nothing_is_left_to_run_while_the_last_token_is_in_flight() -> None:
    s = scheduler({A: 10})
    s.add(request("r", max_tokens=1))
    first = plan(s)
    assert s.schedule(Epoch(1), 2) is None
    s.commit(answers(first))
    assert s.num_requests == 0


def test_a_token_past_the_end_is_thrown_away() -> None:
    s = scheduler({A: 10})
    s.add(request("r"))
    first, second = in_flight(s)
    assert [o.finish_reason for o in s.commit(answers(first, EOS))] == [FinishReason.STOP]
    assert s.status().kv_usage[A] == 0
    s.add(request("q"))
    third = plan(s, 3)
    assert third[A].finished == ("r",)
    assert not s.commit(answers(second, 9))
    s.validate()
    assert [o.request_id for o in s.commit(answers(third))] == ["q"]


def test_an_abort_with_two_steps_in_flight() -> None:
    s = scheduler({A: 10})
    s.add(request("r"))
    s.add(request("q"))
    first, second = in_flight(s)
    s.abort(RequestId("r"))
    s.validate()
    for plans in (first, second):
        assert [o.request_id for o in s.commit(answers(plans))] == ["q"]
        s.validate()
    assert plan(s, 3)[A].finished == ("r",)


def test_both_steps_are_run_again_if_the_first_failed() -> None:
    s = scheduler({A: 10, B: 10})
    s.add(request("r", prompt=20))
    first, second = in_flight(s)
    assert (chunk(first, "r").length, chunk(second, "r").length) == (16, 4)
    s.rollback()
    s.validate()
    again = in_flight(s)
    assert [chunk(p, "r") for p in again] == [chunk(first, "r"), chunk(second, "r")]
    assert again[0][A].new == first[A].new


def test_only_the_second_step_is_run_again_if_the_first_is_done() -> None:
    s = scheduler({A: 10})
    s.add(request("r", prompt=4))
    first, second = in_flight(s)
    s.commit(answers(first))
    s.rollback()
    s.validate()
    again = plan(s, 3)
    # with the block that its worker may never have been told
    assert chunk(again, "r") == chunk(second, "r")
    assert not again[A].new


def test_requests_to_forget_are_sent_again_after_a_failure() -> None:
    s = scheduler({A: 10})
    s.add(request("gone"))
    s.add(request("r"))
    s.commit(answers(plan(s, 1)))
    s.abort(RequestId("gone"))
    first, second = in_flight(s)
    assert (first[A].finished, second[A].finished) == (("gone",), ())
    s.rollback()
    assert plan(s, 3)[A].finished == ("gone",)


def test_a_request_preempted_in_flight_drops_its_tokens_in_flight() -> None:
    s = scheduler({A: 5})
    s.add(request("old", prompt=8, max_tokens=12))
    s.add(request("new", prompt=8, max_tokens=12))
    first, second = in_flight(s)
    c = chunk(second, "new")
    assert (c.start, c.length, c.known) == (0, 8, 8), "it had to make room, and begins anew"
    assert second[A].finished == ("new",)
    assert [o.request_id for o in s.commit(answers(first))] == ["old"]
    s.validate()
    assert [(o.request_id, o.offset) for o in s.commit(answers(second))] == [("old", 1), ("new", 0)]
    for step in range(3, 40):
        if (plans := try_plan(s, step)) is None:
            break
        s.commit(answers(plans))
    assert s.num_requests == 0
