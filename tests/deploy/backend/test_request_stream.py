"""What waits in the API for a reader: tokens and scores of prompts, merged, counted, and never twice."""

from __future__ import annotations

import asyncio
import dataclasses

from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, SamplingParams, TokenOutput
from elastic_moe.deploy.backend.request_stream import RequestStream
from tests.actors.simulated_worker import scores_of

PROMPT = tuple(range(1, 20))


def stream() -> RequestStream:
    params = SamplingParams(max_tokens=2, prompt_logprobs=0)
    return RequestStream(GenerateRequest(request_id=RequestId("r"), prompt_token_ids=PROMPT, params=params))


def scores(start: int, end: int) -> TokenOutput:
    return TokenOutput(request_id=RequestId("r"), offset=0, token_ids=(), scores=scores_of(PROMPT, start, end))


def token(offset: int, **more: FinishReason) -> TokenOutput:
    return TokenOutput(request_id=RequestId("r"), offset=offset, token_ids=(7,), **more)


def test_pieces_are_read_as_one_and_counted() -> None:
    one = stream()
    assert one.take(scores(1, 6))
    assert one.take(dataclasses.replace(token(0), scores=scores_of(PROMPT, 6, 19)))
    assert one.take(token(1, finish_reason=FinishReason.LENGTH))
    assert one.unread == 18 + 2
    output = asyncio.run(one.next())
    assert output.scores == scores_of(PROMPT, 1, 19)
    assert (output.token_ids, output.finish_reason, one.unread) == ((7, 7), FinishReason.LENGTH, 0)


def test_a_resumed_request_says_what_has_come() -> None:
    one = stream()
    one.take(scores(1, 6))
    assert (one.resumed.num_scored, one.resumed.output_token_ids) == (5, ())


def test_repeats_are_dropped_and_gaps_are_told() -> None:
    """The next engine may be behind by what the last one had sent when it died."""
    one = stream()
    one.take(scores(1, 6))
    assert asyncio.run(one.next()).scores == scores_of(PROMPT, 1, 6)
    assert one.take(scores(1, 6))
    assert one.take(scores(4, 9))
    assert not one.take(scores(12, 14))
    assert asyncio.run(one.next()).scores == scores_of(PROMPT, 6, 9)


def test_times_and_resumptions_are_told_with_the_first_and_the_last_token() -> None:
    one = stream()
    one.resubmissions = 1
    one.take(dataclasses.replace(token(0), queued_s=0.5))
    one.take(dataclasses.replace(token(1, finish_reason=FinishReason.LENGTH), resumptions=2))
    output = asyncio.run(one.next())
    assert (output.queued_s, output.resumptions) == (0.5, 3)
