"""Tokens of a response become events and output items. Deterministic: whoever renders the same tokens makes the same
events with the same numbers, however the engine has cut the tokens into outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from elastic_moe.cluster.messages.requests import FinishReason, TokenOutput
from elastic_moe.deploy.generation.answer import Answer, Delta, ScoredToken
from elastic_moe.deploy.parsing.events import CallArguments, CallBegin, CallEnd, TextKind, TextPiece
from elastic_moe.deploy.parsing.events import Event as ParsedEvent
from elastic_moe.deploy.responses.events import Event, Logprob, Output, snapshot
from elastic_moe.deploy.responses.record import STATUS_OF, Ending, Record, Status, suffix_of
from elastic_moe.deploy.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""OpenAI's value for a token of probability 0: JSON has no minus infinity."""

LAST_EVENTS = {
    Status.COMPLETED: "response.completed",
    Status.INCOMPLETE: "response.incomplete",
    Status.FAILED: "response.failed",
    # OpenAI has no event of that name
    Status.CANCELLED: "response.incomplete",
}


class Rendering:
    """One pass over a response's tokens, from the first event to the last one."""

    def __init__(self, record: Record, answer: Answer, tokenizer: Tokenizer) -> None:
        """`answer` is a fresh one of the record's request."""
        self._record = record
        self._answer = answer
        self._tokenizer = tokenizer
        self._output = Output(suffix_of(record.id))
        self._logprobs: list[Logprob] = []
        """Log probabilities of tokens whose text has not come yet."""
        self._events = 0
        self.ending: Ending | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return self._answer.completion_tokens

    def begin(self) -> list[Event]:
        events = [self._whole("response.created", Status.QUEUED if self._record.background else Status.IN_PROGRESS)]
        if self._record.background:
            events.append(self._whole("response.queued", Status.QUEUED))
        return self._numbered([*events, self._whole("response.in_progress", Status.IN_PROGRESS)])

    def feed(self, output: TokenOutput) -> list[Event]:
        """The events that an output makes; after the last one of the response, none."""
        events: list[Event] = []
        for one in tokens_of(output):
            if self.ending is not None:
                break
            events += self._feed(one)
        return self._numbered(events)

    def response(self, status: Status | None = None) -> dict[str, Any]:
        """OpenAI's object. The output is shown once the response has ended, unless `status` is given."""
        return response_of(
            self._record,
            status or (Status.IN_PROGRESS if self.ending is None else STATUS_OF[self.ending.reason]),
            output=[snapshot(item) for item in self._output.items] if self.ending is not None else [],
            usage=self._usage() if self.ending is not None else None,
            error=None if self.ending is None else self.ending.error,
        )

    # --- Inside -------------------------------------------------------------------------------------------------

    def _feed(self, one: TokenOutput) -> list[Event]:
        if one.finish_reason is FinishReason.ERROR:
            held = self._pieces(self._answer.take_held())
            ending = Ending(reason=FinishReason.ERROR, error=one.error or "the engine has ended this request")
            return [*held, *self._end(ending)]
        delta = self._answer.feed(one)
        events = self._pieces(delta)
        if delta.finish_reason is not None:
            events += self._end(Ending(reason=delta.finish_reason))
        return events

    def _pieces(self, delta: Delta) -> list[Event]:
        self._logprobs += [self._scored(token) for token in delta.tokens]
        if self._answer.parser is None:
            return self._text(delta.text)
        return [event for piece in delta.events for event in self._piece(piece)]

    def _piece(self, piece: ParsedEvent) -> list[Event]:
        match piece:
            case TextPiece(kind=TextKind.CONTENT):
                return self._text(piece.text)
            case TextPiece():
                return self._output.reasoning(piece.text)
            case CallBegin():
                return self._output.call(piece.name, piece.call_id)
            case CallArguments():
                return self._output.arguments(piece.text)
            case CallEnd():
                return self._output.close(complete=piece.complete)

    def _text(self, text: str) -> list[Event]:
        if not text:
            return []
        logprobs, self._logprobs = self._logprobs, []
        return self._output.text(text, logprobs)

    def _end(self, ending: Ending) -> list[Event]:
        events: list[Event] = []
        if self._logprobs or (not self._output.items and ending.reason is not FinishReason.ERROR):
            # an answer without text is an empty message
            events += self._output.text("", self._logprobs)
        events += self._output.close(complete=ending.reason is FinishReason.STOP)
        self.ending = ending
        status = STATUS_OF[ending.reason]
        return [*events, self._whole(LAST_EVENTS[status], status)]

    def _whole(self, kind: str, status: Status) -> Event:
        return {"type": kind, "response": self.response(status)}

    def _numbered(self, events: Sequence[Event]) -> list[Event]:
        first = self._events
        self._events += len(events)
        return [{**event, "sequence_number": first + number} for number, event in enumerate(events)]

    def _usage(self) -> dict[str, Any]:
        prompt, made = len(self._answer.request.prompt_token_ids), self._answer.completion_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self._answer.cached_tokens or 0, "cache_write_tokens": 0},
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": self._answer.reasoning_tokens},
            "total_tokens": prompt + made,
        }

    def _scored(self, token: ScoredToken) -> Logprob:
        top = [self._named(*pair) for pair in token.logprobs.top]
        return {**self._named(token.logprobs.token_id, token.logprobs.logprob), "top_logprobs": top}

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_string(token_id),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


def response_of(
    record: Record,
    status: Status,
    *,
    output: Sequence[dict[str, Any]] = (),
    usage: dict[str, Any] | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """OpenAI's object of a response."""
    return {
        "id": record.id,
        "object": "response",
        "created_at": record.created_at_s,
        **record.frame,
        "status": status.value,
        "error": None if error is None else {"code": "server_error", "message": error},
        "incomplete_details": {"reason": "max_output_tokens"} if status is Status.INCOMPLETE else None,
        "output": list(output),
        "usage": usage,
    }


def outputs_of(record: Record) -> Iterator[TokenOutput]:
    """The outputs of a response that has ended, token by token."""
    assert record.outcome is not None
    return tokens_of(
        TokenOutput(
            request_id=record.request.request_id,
            offset=0,
            token_ids=record.outcome.token_ids,
            cached_tokens=record.outcome.cached_tokens,
            finish_reason=record.outcome.ending.reason,
            error=record.outcome.ending.error,
        )
    )


def sse(event: Event) -> bytes:
    """A server-sent event, as OpenAI's API writes it."""
    kind: str = event["type"]
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


def tokens_of(output: TokenOutput) -> Iterator[TokenOutput]:
    """The output cut into outputs of one token each. The last token has the end where the model has made it; an end
    that came from elsewhere follows it, as it does where every token is sent by itself."""
    by_token = output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    last = len(output.token_ids) - 1
    for number, token in enumerate(output.token_ids):
        ends = by_token and number == last
        yield dataclasses.replace(
            output,
            offset=output.offset + number,
            token_ids=(token,),
            logprobs=output.logprobs[number : number + 1],
            finish_reason=output.finish_reason if ends else None,
            stop_token_id=output.stop_token_id if ends else None,
            error=None,
        )
    if output.finish_reason is not None and not (by_token and output.token_ids):
        yield dataclasses.replace(output, offset=output.offset + last + 1, token_ids=(), logprobs=())
