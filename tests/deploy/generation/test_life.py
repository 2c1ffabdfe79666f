"""The times of a request: what is counted, and what its trace says."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from elastic_moe.actors.telemetry.spans import Span, trace_parent
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, SamplingParams, TokenOutput
from elastic_moe.deploy.generation.life import Life, Times

REQUEST = GenerateRequest(request_id=RequestId("r-0"), prompt_token_ids=(1, 2), params=SamplingParams(max_tokens=9))


class Exported:
    """Keeps what would be sent."""

    def __init__(self) -> None:
        self.spans: list[tuple[Span, str | None]] = []

    def export(self, span: Span, parent: str | None = None) -> None:
        self.spans.append((span, parent))


def clock(*moments: float) -> Iterator[float]:
    yield from moments


def output(queued_s: float | None = None, resumptions: int = 0) -> TokenOutput:
    return TokenOutput(
        request_id=RequestId("r-0"), offset=0, token_ids=(7,), queued_s=queued_s, resumptions=resumptions
    )


def lived(*moments: float) -> Life:
    """Three tokens, of which the second and third come together, at the second and third moment."""
    life = Life(REQUEST, clock=clock(*moments).__next__)
    life.came(output(queued_s=0.25), 1)
    life.came(output(resumptions=2), 3)
    return life


def test_stages_are_told_apart() -> None:
    times = lived(10.0, 11.0, 13.0, 13.5).times()
    assert times == Times(queued_s=0.25, first_s=1.0, last_s=3.0, whole_s=3.5)
    assert (times.prefill_s, times.decode_s) == (0.75, 2.0)


def test_a_request_that_got_no_token_has_no_stages() -> None:
    times = Life(REQUEST, clock=clock(1.0, 2.0).__next__).times()
    assert (times.prefill_s, times.decode_s, times.whole_s) == (None, None, 1.0)


def test_the_trace_joins_the_clients() -> None:
    exported = Exported()
    token = trace_parent.set("00-a-b-01")
    life = lived(10.0, 11.0, 13.0, 13.5)
    trace_parent.reset(token)
    life.report(life.times(), FinishReason.STOP, exported, log=False)  # type: ignore[arg-type]
    ((span, parent),) = exported.spans
    assert parent == "00-a-b-01"
    assert (span.name, span.serves, span.error) == ("llm_request", True, None)
    begun = span.begin_s
    assert [(child.name, child.begin_s - begun, child.end_s - begun) for child in span.children] == [
        ("queue", pytest.approx(0, abs=1e-3), pytest.approx(0.25, abs=1e-3)),
        ("prefill", pytest.approx(0.25, abs=1e-3), pytest.approx(1.0, abs=1e-3)),
        ("decode", pytest.approx(1.0, abs=1e-3), pytest.approx(3.0, abs=1e-3)),
    ]
    assert span.attributes["gen_ai.request.id"] == "r-0"
    assert span.attributes["gen_ai.usage.completion_tokens"] == 3
    assert span.attributes["emoe.resumptions"] == 2


def test_a_failed_request_says_so_and_leaves_out_what_it_has_not() -> None:
    exported = Exported()
    life = Life(REQUEST, clock=clock(1.0, 2.0).__next__)
    life.report(life.times(), FinishReason.ERROR, exported, log=False)  # type: ignore[arg-type]
    ((span, _),) = exported.spans
    assert span.error is not None
    assert span.children == ()
    assert "gen_ai.latency.time_in_queue" not in span.attributes


def test_a_line_names_the_request(caplog: pytest.LogCaptureFixture) -> None:
    life = lived(10.0, 11.0, 13.0, 13.5)
    with caplog.at_level(logging.INFO):
        life.report(life.times(), FinishReason.STOP, None, log=True)
    (record,) = caplog.records
    assert record.__dict__["request_id"] == "r-0"
    assert record.getMessage() == "request r-0 ended (stop) after 3.500 s: 2 prompt tokens, 3 tokens"
