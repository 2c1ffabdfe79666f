"""Sends spans to an OpenTelemetry collector by OTLP.

OpenTelemetry's packages are imported only where an endpoint is given: `pip install 'elastic-moe[otlp]'` brings them.
They send in batches from a thread of their own, so nothing here waits for the collector; what it does not take for long
is lost. OTEL_* variables of the environment count as usual (headers, certificates, sampling).
"""

from __future__ import annotations

import importlib.util
import os
import threading
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

from elastic_moe.actors.telemetry.spans import Span
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError

HTTP = "opentelemetry.exporter.otlp.proto.http"
GRPC = "opentelemetry.exporter.otlp.proto.grpc"
NANO = 1_000_000_000
CLOSE_S = 2.0
"""Most seconds that the last spans have to be sent."""
BATCH_MS = 1000
"""Milliseconds for which spans are collected until they are sent."""


def transport(endpoint: str) -> str:
    """The package that sends to this URL: a URL with a path is HTTP's (http://host:4318/v1/traces), others gRPC's."""
    parts = urlsplit(endpoint)
    return HTTP if parts.scheme in ("http", "https") and parts.path.strip("/") else GRPC


def check_installed(config: ServeConfig) -> None:
    """Raises ConfigError where traces are asked for and the packages that send them are missing."""
    if config.otlp_traces_endpoint is None:
        return
    name = transport(config.otlp_traces_endpoint)
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise ConfigError(f"otlp_traces_endpoint: {name} is not installed: pip install 'elastic-moe[otlp]'")


class Exporter:
    """Any thread may use it. `close` sends what is left, for CLOSE_S at most."""

    def __init__(self, processor: Any, *, process: str, model: str) -> None:
        """processor: OpenTelemetry's SpanProcessor. process: the kind of process, such as `api`."""
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider

        fields = {
            "service.name": "elastic-moe",
            "service.version": metadata.version("elastic-moe"),
            "service.instance.id": f"{process}-{os.getpid()}",
            "gen_ai.response.model": model,
        }
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, where they are set, win
        resource = Resource(fields).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("elastic_moe")

    @classmethod
    def open(cls, config: ServeConfig, process: str, model: str) -> Exporter | None:
        """The exporter that the configuration asks for; None where it asks for none."""
        if config.otlp_traces_endpoint is None:
            return None
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        processor = BatchSpanProcessor(_sender(config.otlp_traces_endpoint), schedule_delay_millis=BATCH_MS)
        return cls(processor, process=process, model=model)

    def export(self, span: Span, parent: str | None = None) -> None:
        """`parent`: a `traceparent` header, in whose trace the span belongs. Never raises for what a client sent."""
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {} if parent is None else {"traceparent": parent}
        self._export(span, TraceContextTextMapPropagator().extract(headers, context=Context()))

    def _export(self, span: Span, context: Any) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        made = self._tracer.start_span(
            span.name,
            context=context,
            kind=SpanKind.SERVER if span.serves else SpanKind.INTERNAL,
            attributes=dict(span.attributes),
            start_time=round(span.begin_s * NANO),
        )
        if span.error is not None:
            made.set_status(Status(StatusCode.ERROR, span.error))
        inside = set_span_in_context(made, context)
        for child in span.children:
            self._export(child, inside)
        made.end(end_time=round(span.end_s * NANO))

    def close(self) -> None:
        # it waits for a collector that does not answer, far longer than a server has to end
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(CLOSE_S)


def _sender(endpoint: str) -> Any:
    if transport(endpoint) == HTTP:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

        return OverHttp(endpoint=endpoint)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

    return OverGrpc(endpoint=urlsplit(endpoint).netloc, insecure=urlsplit(endpoint).scheme in ("http", "grpc"))
