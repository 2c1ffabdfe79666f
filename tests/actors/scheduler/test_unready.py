"""Requests whose grammar's next tokens are late, or cannot go on: nobody waits for them."""

from __future__ import annotations

import dataclasses

from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.cluster.messages.requests import FinishReason, RequestId, TokenOutput
from elastic_moe.cluster.messages.steps import StepPlan, StepResult, Stuck
from elastic_moe.cluster.placement import WorkerId
from tests.actors.batches import EOS, A, answers, plan, request, scheduler, step

LATE = RequestId("late")
GRAMMAR = Grammar(kind=GrammarKind.REGEX, text="a*")


def without_late(plans: dict[WorkerId, StepPlan], **instead: object) -> dict[WorkerId, StepResult]:
    return {
        worker: dataclasses.replace(
            result,
            samples=tuple(sample for sample in result.samples if sample.request_id != LATE),
            **instead,  # type: ignore[arg-type]
        )
        for worker, result in answers(plans).items()
    }


def commit(s: Scheduler, results: dict[WorkerId, StepResult]) -> list[TokenOutput]:
    outputs = s.commit(results)
    s.validate()
    return outputs


def test_only_the_last_token_of_a_late_request_runs_again() -> None:
    s = scheduler({A: 16})
    s.add(request(LATE, prompt=6, max_tokens=2))
    s.add(request("other", prompt=5, max_tokens=3))
    first, ahead = plan(s, 1), plan(s, 2)
    assert [o.request_id for o in commit(s, without_late(first, unready=(LATE,)))] == ["other"]
    again = plan(s, 3)
    (chunk,) = [chunk for chunk in again[A].chunks if chunk.request_id == LATE]
    assert (chunk.start, chunk.length, chunk.known) == (5, 1, 6)
    assert not again[A].new, "the worker knows its tokens"
    # what was on its way has run with a wrong token
    assert [o.request_id for o in commit(s, without_late(ahead, unready=(LATE,)))] == ["other"]
    assert {o.request_id: o.offset for o in commit(s, answers(again))} == {LATE: 0, "other": 2}
    assert [o.request_id for o in step(s)] == [LATE]
    assert s.status().kv_usage == {A: 0.0}


def test_blocks_that_may_be_written_to_again_are_not_shared() -> None:
    s = scheduler({A: 16}, block_size=4, enable_prefix_caching=True)
    s.add(request(LATE, prompt=8, max_tokens=2))
    commit(s, without_late(plan(s), unready=(LATE,)))
    s.add(request("same", prompt=9, max_tokens=1))
    s.abort(LATE)
    assert step(s)[0].cached_tokens == 4


def test_a_request_whose_grammar_cannot_go_on_ends_with_the_reason() -> None:
    s = scheduler({A: 16})
    s.add(request(LATE, max_tokens=5))
    s.add(request("other", max_tokens=1))
    stuck = (Stuck(request_id=LATE, reason="too complex"),)
    ended = {o.request_id: o for o in commit(s, without_late(plan(s), stuck=stuck))}
    assert (ended[LATE].finish_reason, ended[LATE].error) == (FinishReason.ERROR, "too complex")
    assert ended[LATE].refused
    assert ended[RequestId("other")].finish_reason is FinishReason.LENGTH
    assert s.num_requests == 0
    assert s.status().corrupted_requests == 0


def test_a_grammars_end_ends_the_answer_whatever_else_was_asked_for() -> None:
    for params in ({"ignore_eos": True}, {"min_tokens": 5}):
        s = scheduler({A: 16})
        s.add(request("free", max_tokens=9, **params))
        s.add(request("bound", max_tokens=9, grammar=GRAMMAR, **params))
        reasons = {output.request_id: output.finish_reason for output in step(s, token=EOS)}
        assert reasons == {"free": None, "bound": FinishReason.STOP}
