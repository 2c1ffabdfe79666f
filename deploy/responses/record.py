"""What is kept of a response: enough for any replica to continue it, to show it, and to continue its conversation."""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId

Item = dict[str, Any]


class Status(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    CANCELLED = "cancelled"


STATUS_OF = {
    FinishReason.STOP: Status.COMPLETED,
    FinishReason.LENGTH: Status.INCOMPLETE,
    FinishReason.ABORT: Status.CANCELLED,
    FinishReason.ERROR: Status.FAILED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the engine's part of a response ended."""

    reason: FinishReason
    error: str | None = None
    """For the reason ERROR: one line for the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A response that has ended. Events are made of `token_ids` and `ending` again, wherever they are asked for."""

    token_ids: tuple[int, ...]
    ending: Ending
    cached_tokens: int
    ended_at_s: float
    """Wall clock; only the age of the record is computed from it."""
    response: dict[str, Any]
    """OpenAI's object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    id: str
    created_at_s: int
    background: bool
    frame: dict[str, Any]
    """The fields of OpenAI's object that do not change: what was asked for."""
    input: list[Item]
    """The items of this request."""
    history: list[Item]
    """The items of the conversation before them."""
    chat: dict[str, Any]
    """The body of the chat that the response is, without its messages."""
    request: GenerateRequest
    outcome: Outcome | None = None
    generation: str = ""
    """The cluster that answers: its model's tokens mean nothing to another one (cluster/redeploy.py)."""

    @property
    def conversation(self) -> list[Item]:
        """All items up to the end of this response, for the next request of the conversation."""
        output = [] if self.outcome is None else self.outcome.response["output"]
        # a call that was cut off cannot be answered
        whole = [item for item in output if item["type"] != "function_call" or item["status"] == "completed"]
        return [*self.history, *self.input, *whole]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Record)


def encode(record: Record) -> bytes:
    return _ENCODER.encode(record)


def decode(data: bytes) -> Record:
    return _DECODER.decode(data)


def new_response_id() -> str:
    return f"resp_{secrets.token_hex(24)}"


def suffix_of(response_id: str) -> str:
    """What ids of the response's items begin with: they are the same wherever they are made."""
    return response_id.removeprefix("resp_")


def request_id(response_id: str) -> RequestId:
    return RequestId(response_id)


def call_ids(response_id: str, chars: int | None) -> Callable[[], str]:
    """Makes the ids of a response's calls, one after the other. `chars`: their length, where the template insists."""
    numbers = itertools.count()

    def new_id() -> str:
        digest = hashlib.blake2b(f"{response_id}/{next(numbers)}".encode(), digest_size=16).hexdigest()
        return f"call_{digest[:24]}" if chars is None else digest[:chars]

    return new_id
