"""What the parser of an answer says, in the order in which the model wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


class TextKind(StrEnum):
    CONTENT = "content"
    REASONING = "reasoning"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece:
    """More text of the answer, or of the reasoning before it. Never empty."""

    kind: TextKind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallBegin:
    """A tool call begins. Its arguments follow before another call begins."""

    index: int
    """Number of the call within its answer, from 0."""
    call_id: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallArguments:
    """More of the arguments of the call that began last: JSON text. Never empty."""

    index: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEnd:
    """The call that began last has ended.

    Its arguments may be cut off, or may be no JSON, where the model did not finish them or wrote something else.
    """

    index: int
    complete: bool
    """Whether the model has finished the call: its arguments have all their brackets, or its end marker came."""


Event: TypeAlias = TextPiece | CallBegin | CallArguments | CallEnd


def merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same with fewer events: neighbours that say more of the same text are one."""
    made: list[Event] = []
    for event in events:
        last = made[-1] if made else None
        if isinstance(event, TextPiece) and isinstance(last, TextPiece) and event.kind is last.kind:
            made[-1] = TextPiece(kind=event.kind, text=last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and event.index == last.index:
            made[-1] = CallArguments(index=event.index, text=last.text + event.text)
        else:
            made.append(event)
    return tuple(made)
