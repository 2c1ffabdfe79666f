"""A request's trace, from its HTTP headers to the collector."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.actors.telemetry.collector import collecting
from tests.deploy.conftest import client_of
from tests.deploy.fakes import FakeBackend

TRACE = "0af7651916cd43dd8448eb211c80319c"


def test_a_request_is_a_span_in_its_clients_trace(model_dir: Path) -> None:
    async def work(url: str) -> None:
        async with client_of(FakeBackend(), model_dir, otlp_traces_endpoint=url) as client:
            headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
            answer = await client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 3}, headers=headers)
            assert answer.status_code == 200

    with collecting() as collector:
        asyncio.run(work(collector.url))
        spans = collector.spans
    assert spans.keys() == {"llm_request", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    attributes = {field.key: field.value for field in spans["llm_request"].attributes}
    assert attributes["gen_ai.usage.completion_tokens"].int_value == 3
    assert attributes["gen_ai.latency.time_in_queue"].double_value == 0.125
    assert attributes["gen_ai.request.id"].string_value.startswith("cmpl-")
