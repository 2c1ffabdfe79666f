"""Log probabilities of prompts, event by event: what is asked of workers, what is not taken from a cache, and when the
client gets it. Random orders of events are in test_random.py."""

from __future__ import annotations

import dataclasses

import pytest

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.requests import FinishReason, TokenOutput
from elastic_moe.cluster.messages.steps import ScoredPrompt, StepResult
from elastic_moe.cluster.placement import WorkerId
from tests.actors.batches import A, B, Plans, answers, plan, request, scheduler
from tests.actors.simulated_worker import scores_of

PROMPT = tuple(range(1, 31))


def scored(plans: Plans) -> dict[WorkerId, StepResult]:
    """What workers answer to these plans, where every prompt is PROMPT."""
    found = answers(plans)
    for worker, one in plans.items():
        scores = [
            ScoredPrompt(
                request_id=c.request_id,
                scores=scores_of(PROMPT, c.score_from + 1, min(c.start + c.length, len(PROMPT) - 1) + 1),
            )
            for c in one.chunks
            if c.score_from is not None
        ]
        found[worker] = dataclasses.replace(found[worker], scored=tuple(scores))
    return found


def places(outputs: list[TokenOutput]) -> list[tuple[int, int]]:
    return [(o.scores.start, o.scores.end) for o in outputs if o.scores is not None]


def test_each_chunk_brings_its_scores_and_the_end_no_token() -> None:
    s = scheduler({A: 16})
    s.add(request("a", 30, max_tokens=0, prompt_logprobs=0))
    first = s.commit(scored(plan(s, 0)))
    assert places(first) == [(1, 17)]
    assert (first[0].token_ids, first[0].finish_reason) == ((), None)
    last = s.commit(scored(plan(s, 1)))
    assert places(last) == [(17, 30)]
    assert (last[0].token_ids, last[0].finish_reason) == ((), FinishReason.LENGTH)
    assert s.num_requests == 0
    assert s.status().generation_tokens == 0


def test_a_prompt_as_long_as_the_model_can_be_scored() -> None:
    s = scheduler({A: 16}, max_model_len=30, max_num_batched_tokens=64)
    with pytest.raises(RequestError, match="longest context"):
        s.add(request("a", 30, max_tokens=1))
    s.add(request("b", 30, max_tokens=0, prompt_logprobs=0))
    assert places(s.commit(scored(plan(s)))) == [(1, 30)]


def test_no_score_is_lost_to_the_cache() -> None:
    s = scheduler({A: 32}, enable_prefix_caching=True, max_num_batched_tokens=64)
    s.add(request("plain", 30, max_tokens=1))
    s.commit(scored(plan(s, 0)))
    s.add(request("scores", 30, max_tokens=1, prompt_logprobs=0))
    plans = plan(s, 1)
    assert [(c.start, c.length, c.score_from) for c in plans[A].chunks] == [(0, 30, 0)]
    assert places(s.commit(scored(plans))) == [(1, 30)]
    s.add(request("again", 30, max_tokens=1))
    assert plan(s, 2)[A].chunks[0].start == 28


def test_what_was_scored_before_the_worker_was_lost_is_not_scored_again() -> None:
    s = scheduler({A: 16, B: 16}, max_num_prefill_tokens=16, max_num_batched_tokens=16)
    s.add(request("a", 30, max_tokens=3, prompt_logprobs=0))
    plans = plan(s, 0)
    (home,) = [worker for worker, one in plans.items() if one.chunks]
    assert places(s.commit(scored(plans))) == [(1, 17)]
    # the second step is in flight when its worker dies
    plan(s, 1)
    s.rollback()
    other = A if home == B else B
    s.set_workers({other: 16})
    again = plan(s, 2)
    assert [(c.start, c.length, c.score_from) for c in again[other].chunks] == [(0, 16, None)]
    s.commit(scored(again))
    last = plan(s, 3)
    assert [(c.start, c.length, c.score_from) for c in last[other].chunks] == [(16, 14, 16)]
    assert places(s.commit(scored(last))) == [(17, 30)]


def test_a_resumed_request_is_scored_from_where_its_client_is() -> None:
    s = scheduler({A: 16}, max_num_batched_tokens=64)
    s.add(dataclasses.replace(request("a", 30, prompt_logprobs=0), num_scored=20))
    assert places(s.commit(scored(plan(s, 0)))) == [(21, 30)]
    s.add(dataclasses.replace(request("b", 30, (7, 7), prompt_logprobs=0), num_scored=29))
    outputs = s.commit(scored(plan(s, 1)))
    assert places(outputs) == []


def test_steps_ahead_score_each_token_once() -> None:
    s = scheduler({A: 16}, max_num_batched_tokens=8)
    s.add(request("a", 30, prompt_logprobs=0))
    plans = [plan(s, step) for step in range(4)]
    assert [one[A].chunks[0].score_from for one in plans] == [0, 8, 16, 24]
    assert [places(s.commit(scored(one))) for one in plans] == [[(1, 9)], [(9, 17)], [(17, 25)], [(25, 30)]]


def test_logits_that_are_not_numbers_end_the_request() -> None:
    s = scheduler({A: 16}, max_num_batched_tokens=8)
    s.add(request("a", 30, prompt_logprobs=0))
    plans = plan(s)
    broken = dataclasses.replace(scored(plans)[A], scored=(), corrupted=(plans[A].chunks[0].request_id,))
    (output,) = s.commit({A: broken})
    assert output.finish_reason is FinishReason.ERROR
    assert s.num_requests == 0


def test_a_worker_must_score_what_it_was_asked_to() -> None:
    s = scheduler({A: 16}, max_num_batched_tokens=8)
    s.add(request("a", 30, prompt_logprobs=0))
    plans = plan(s)
    with pytest.raises(AssertionError, match="has not scored"):
        s.commit(answers(plans))
