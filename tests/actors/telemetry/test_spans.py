"""An operation becomes a span when it ends, with its phases as children."""

from __future__ import annotations

from dataclasses import replace

from elastic_moe.actors.telemetry.spans import OperationSpans, Span
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.views import Operation, OperationKind, Phase
from elastic_moe.cluster.placement import WorkerId

SCALE = Operation(
    operation_id="scale-1",
    kind=OperationKind.SCALE,
    phase=Phase.PREPARING,
    epoch=Epoch(4),
    reason="asked for 2 workers",
    retiring=(WorkerId("w1"), WorkerId("w2")),
)


def times(span: Span) -> list[tuple[str, float, float]]:
    return [(child.name, child.begin_s, child.end_s) for child in span.children]


def test_phases_follow_one_another() -> None:
    spans = OperationSpans()
    assert spans.look([SCALE], 10.0) == []
    assert spans.look([SCALE], 11.0) == []
    assert spans.look([replace(SCALE, phase=Phase.COMMITTING)], 12.0) == []
    (span,) = spans.look([replace(SCALE, phase=Phase.COMPLETED, reason="done")], 12.5)
    assert (span.name, span.begin_s, span.end_s, span.error) == ("operation scale", 10.0, 12.5, None)
    assert times(span) == [("preparing", 10.0, 12.0), ("committing", 12.0, 12.5)]
    assert span.attributes["emoe.operation.id"] == "scale-1"
    assert span.attributes["emoe.operation.reason"] == "done"
    assert span.attributes["emoe.operation.retiring"] == "w1,w2"
    assert spans.look([replace(SCALE, phase=Phase.COMPLETED)], 13.0) == []


def test_an_attempt_that_is_made_again_is_seen() -> None:
    spans = OperationSpans()
    for now_s, phase in enumerate((Phase.PREPARING, Phase.COMMITTING, Phase.PREPARING)):
        spans.look([replace(SCALE, phase=phase)], float(now_s))
    (span,) = spans.look([replace(SCALE, phase=Phase.FAILED, error="w3 died")], 3.0)
    assert [name for name, _, _ in times(span)] == ["preparing", "committing", "preparing"]
    assert span.error == "w3 died"


def test_what_had_ended_before_is_no_news() -> None:
    """A coordinator that was started again finds old operations."""
    assert OperationSpans().look([replace(SCALE, phase=Phase.COMPLETED)], 1.0) == []
