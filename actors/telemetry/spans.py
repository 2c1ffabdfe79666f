"""Spans as values, and the spans of operations. Times are seconds since 1970.

An operation's span begins when the operation is opened and ends with it. Its children are its phases, in the order in
which they came; a phase that an attempt went back to comes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from elastic_moe.cluster.facts.operations import ENDED
from elastic_moe.cluster.messages.views import Operation, Phase

Attribute = str | int | float | bool

trace_parent: ContextVar[str | None] = ContextVar("trace_parent", default=None)
"""The `traceparent` header (W3C Trace Context) of the request that this code serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    name: str
    begin_s: float
    end_s: float
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    children: tuple[Span, ...] = ()
    error: str | None = None
    """Why it failed, in one line."""
    serves: bool = False
    """Whether it answers a client's request."""


@dataclass(slots=True)
class _Course:
    """An open operation: the times at which its phases began."""

    phases: list[tuple[Phase, float]]


class OperationSpans:
    """Makes a span of each operation that ends."""

    def __init__(self) -> None:
        self._open: dict[str, _Course] = {}

    def look(self, operations: Sequence[Operation], now_s: float) -> list[Span]:
        """Spans of the operations that have ended since the last look. `operations` are all that are kept."""
        ended: list[Span] = []
        for operation in operations:
            course = self._open.get(operation.operation_id)
            if operation.phase not in ENDED:
                if course is None:
                    course = self._open[operation.operation_id] = _Course([])
                if not course.phases or course.phases[-1][0] is not operation.phase:
                    course.phases.append((operation.phase, now_s))
            elif course is not None:
                del self._open[operation.operation_id]
                ended.append(operation_span(operation, course.phases, now_s))
        return ended


def operation_span(operation: Operation, phases: Sequence[tuple[Phase, float]], ended_s: float) -> Span:
    """phases: at least one, each with the time at which it began."""
    ends = [*(begin_s for _, begin_s in phases[1:]), ended_s]
    return Span(
        name=f"operation {operation.kind.value}",
        begin_s=phases[0][1],
        end_s=ended_s,
        attributes={
            "emoe.operation.id": operation.operation_id,
            "emoe.operation.kind": operation.kind.value,
            "emoe.operation.phase": operation.phase.value,
            "emoe.operation.reason": operation.reason,
            "emoe.epoch": operation.epoch,
            **({"emoe.operation.retiring": ",".join(operation.retiring)} if operation.retiring else {}),
        },
        children=tuple(
            Span(name=phase.value, begin_s=begin_s, end_s=end_s)
            for (phase, begin_s), end_s in zip(phases, ends, strict=True)
        ),
        error=operation.error if operation.phase is Phase.FAILED else None,
    )
