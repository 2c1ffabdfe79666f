"""Spans as a collector gets them: over the wire, in the client's trace, and only where somebody asked for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from elastic_moe.actors.telemetry.exporting import GRPC, HTTP, Exporter, check_installed, transport
from elastic_moe.actors.telemetry.spans import Span
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from tests.actors.telemetry.collector import Collector, collecting

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as server:
        yield server


def test_a_collector_gets_the_spans(collector: Collector) -> None:
    exporter = Exporter.open(ServeConfig(otlp_traces_endpoint=collector.url), "api", "tiny")
    assert exporter is not None
    child = Span(name="queue", begin_s=100.0, end_s=100.25)
    whole = Span(
        name="llm_request", begin_s=100.0, end_s=102.0, attributes={"n": 3}, children=(child,), error="no", serves=True
    )
    exporter.export(whole, PARENT)
    exporter.export(Span(name="alone", begin_s=1.0, end_s=2.0), "no such header")
    exporter.close()
    sent = [resource for got in collector.got for resource in got.resource_spans]
    fields = {field.key: field.value.string_value for field in sent[0].resource.attributes}
    assert (fields["service.name"], fields["gen_ai.response.model"]) == ("elastic-moe", "tiny")
    spans = collector.spans
    request, queue, alone = spans["llm_request"], spans["queue"], spans["alone"]
    assert request.trace_id.hex() == PARENT.split("-")[1]
    assert request.parent_span_id.hex() == PARENT.split("-")[2]
    assert (queue.trace_id, queue.parent_span_id) == (request.trace_id, request.span_id)
    assert (queue.start_time_unix_nano, queue.end_time_unix_nano) == (100_000_000_000, 100_250_000_000)
    assert (request.attributes[0].key, request.attributes[0].value.int_value) == ("n", 3)
    assert (request.kind, request.status.message) == (request.SPAN_KIND_SERVER, "no")
    assert (alone.parent_span_id, alone.kind) == (b"", alone.SPAN_KIND_INTERNAL)


def test_nothing_is_sent_unless_asked_for() -> None:
    assert Exporter.open(ServeConfig(), "api", "tiny") is None


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("http://localhost:4318/v1/traces", HTTP),
        ("https://collector.example.org/v1/traces", HTTP),
        ("http://localhost:4317", GRPC),
        ("grpc://localhost:4317", GRPC),
        ("https://collector.example.org:4317/", GRPC),
    ],
)
def test_the_url_says_how_to_send(url: str, package: str) -> None:
    assert transport(url) == package
    assert ServeConfig(otlp_traces_endpoint=url).otlp_traces_endpoint == url


@pytest.mark.parametrize("url", ["localhost:4317", "ftp://a/b", "http://", "http:// a"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint: expected a URL"):
        ServeConfig(otlp_traces_endpoint=url)


def test_missing_packages_are_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServeConfig(otlp_traces_endpoint="http://localhost:4318/v1/traces")
    check_installed(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_installed(ServeConfig())
    with pytest.raises(ConfigError, match=r"pip install 'elastic-moe\[otlp\]'"):
        check_installed(config)
