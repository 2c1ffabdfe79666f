"""What an engine keeps of lasting requests, and who gets it."""

from __future__ import annotations

import dataclasses

from elastic_moe.actors.engine import lasting
from elastic_moe.actors.engine.lasting import Lasting
from elastic_moe.actors.liveness import KEPT_S
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, SamplingParams, TokenOutput

A, B = RequestId("a"), RequestId("b")


def request(name: RequestId = A, have: tuple[int, ...] = ()) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=(1,),
        params=SamplingParams(max_tokens=9),
        output_token_ids=have,
        lasting=True,
    )


def output(offset: int, *tokens: int, reason: FinishReason | None = None, name: RequestId = A) -> TokenOutput:
    return TokenOutput(request_id=name, offset=offset, token_ids=tokens, cached_tokens=3, finish_reason=reason)


def test_a_second_follower_gets_what_it_lacks_and_then_the_rest() -> None:
    kept = Lasting()
    kept.begin(request(), "one")
    assert kept.follow(request(), "two") is None
    assert set(kept.take(output(0, 7, 8), 0.0)) == {"one", "two"}
    assert kept.follow(request(have=(7,)), "three") == output(1, 8)
    # one that has more than this engine, which began later
    assert kept.follow(request(have=(7, 8, 9)), "four") is None
    assert set(kept.take(output(2, 9, reason=FinishReason.STOP), 1.0)) == {"one", "two", "three", "four"}
    assert not kept.runs(A)
    assert kept.follow(request(), "five") == output(0, 7, 8, 9, reason=FinishReason.STOP)


def test_a_resumed_request_begins_with_the_tokens_that_it_brings() -> None:
    kept = Lasting()
    kept.begin(request(have=(7, 8)), "one")
    kept.take(output(2, 9), 0.0)
    assert kept.follow(request(), "two") == output(0, 7, 8, 9)


def test_an_error_takes_no_token_back() -> None:
    kept = Lasting()
    kept.begin(request(), "one")
    kept.take(output(0, 7), 0.0)
    kept.take(dataclasses.replace(output(0, reason=FinishReason.ERROR), error="lost"), 1.0)
    found = kept.follow(request(), "two")
    assert found is not None
    assert (found.token_ids, found.finish_reason, found.error) == ((7,), FinishReason.ERROR, "lost")


def test_orphans_are_those_that_no_present_replica_follows() -> None:
    kept = Lasting()
    kept.begin(request(A), "one")
    kept.begin(request(B), "two")
    unknown = RequestId("c")
    assert kept.orphans([A, B, unknown], ["one", "three"]) == (B, unknown)
    kept.gone("one")
    assert kept.orphans([A], ["one"]) == (A,)
    assert kept.runs(A)


def test_what_is_stored_is_forgotten_soon_and_what_is_not_later() -> None:
    kept = Lasting()
    for name in (A, B):
        kept.begin(request(name), "one")
        kept.take(output(0, 7, reason=FinishReason.LENGTH, name=name), 0.0)
    kept.leave(A, "one", 1.0)
    kept.forget_old(1.0 + lasting.STORED_S)
    assert A in kept
    kept.forget_old(1.1 + lasting.STORED_S)
    assert A not in kept
    assert B in kept
    kept.forget_old(KEPT_S + 0.1)
    assert B not in kept


def test_the_oldest_are_forgotten_where_too_many_wait_to_be_stored() -> None:
    kept = Lasting()
    names = [RequestId(str(number)) for number in range(lasting.MOST_ENDED + 2)]
    for number, name in enumerate(names):
        kept.begin(request(name), "one")
        kept.take(output(0, 7, reason=FinishReason.LENGTH, name=name), number / 1e6)
    kept.begin(request(A), "one")
    kept.forget_old(1.0)
    assert [name in kept for name in (*names[:3], A)] == [False, False, True, True]


def test_one_that_runs_goes_on_without_followers() -> None:
    kept = Lasting()
    kept.begin(request(), "one")
    kept.leave(A, "one", 0.0)
    assert kept.runs(A)
    assert set(kept.take(output(0, 7), 0.0)) == set()
    assert kept.cancelled(A) == output(1, reason=FinishReason.ABORT)
