"""What completions and chat completions share: running a request, and writing its response."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.requests import FinishReason
from elastic_moe.deploy.api.http_io import DONE, EventStream, first_then_rest, sse, unless_gone
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.bodies.schema import SamplingFields
from elastic_moe.deploy.generation.answer import Answer, Delta, ScoredToken
from elastic_moe.deploy.generation.shortcut import Shortcut
from elastic_moe.deploy.parsing.events import Event
from elastic_moe.deploy.web.direct import connection_of

T = TypeVar("T")

TOKENS_AT_ONCE = 64
"""Tokens with log probabilities that are written before other requests get their turn: a few milliseconds."""


class Collected:
    """Collects one whole answer from its deltas."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.events: list[Event] = []
        self.called = False
        self.tokens: list[ScoredToken] = []
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.events += delta.events
        self.called |= delta.called
        self.tokens += delta.tokens
        self.token_ids += delta.token_ids
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    def whole(self, index: int) -> Delta:
        return Delta(
            index=index,
            text="".join(self.text),
            events=tuple(self.events),
            called=self.called,
            tokens=tuple(self.tokens),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class Shape(Protocol):
    """How one of the two APIs writes the choices of a response."""

    kind: str
    """The value of `object` in a response."""
    chunk_kind: str

    def whole(self) -> dict[str, Any]:
        """Fields of the response, or of a stream's first event, that belong to no choice."""
        ...

    def scored_tokens(self, index: int) -> int:
        """Number of the prompt's tokens that are written with log probabilities."""
        ...

    def choice(self, answer: Delta) -> dict[str, Any]: ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of the chunk that precedes an answer's text, if the API has such a chunk."""
        ...

    def chunk(self, delta: Delta) -> dict[str, Any]: ...


class Run:
    """One HTTP request, from its answers to its response."""

    def __init__(
        self, service: Service, body: SamplingFields, shape: Shape, answers: Sequence[Answer], response_id: str
    ) -> None:
        self._service = service
        self._body = body
        self._shape = shape
        self._answers = answers
        self._frame = {
            "id": response_id,
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": service.fingerprint,
        }

    async def respond(self, request: Request) -> Response:
        """The response. Raises ClientGone where the client hangs up before there is anything to send."""
        shortcut = self._shortcut(request)
        deltas = self._service.run(self._answers, shortcut)
        try:
            if not self._body.stream:
                return Response(await unless_gone(request, self._whole(deltas)), media_type="application/json")
            # an error before the first token becomes an HTTP status, not an event
            events = self._events(await unless_gone(request, first_then_rest(deltas)))
            return EventStream(events, shortcut)
        except RequestError as error:
            raise self._as_asked(error) from None

    def _shortcut(self, request: Request) -> Shortcut | None:
        """A way for single tokens past the deltas, where one answer is streamed, and the connection has such a way."""
        if not self._body.stream or len(self._answers) != 1 or connection_of(request.scope) is None:
            return None
        return Shortcut(
            self._answers[0],
            lambda delta: self._event([self._shape.chunk(delta)]),
            same_frame=not self._body.continuous_usage,
        )

    def _as_asked(self, error: RequestError) -> RequestError:
        """The engine's refusal, with the name of the field as the client has sent it."""
        names = {"prompt": self._body.PROMPT, "max_tokens": self._body.token_limit_field}
        message = str(error).replace("max_tokens", self._body.token_limit_field)
        param = names.get(error.param or "", error.param)
        return RequestError(message, param=param, code=error.code, status=error.status)

    async def _whole(self, deltas: AsyncGenerator[Delta, None]) -> bytes:
        collected = [Collected() for _ in self._answers]
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                collected[delta.index].add(delta)
        choices = [await self._choice(parts.whole(index)) for index, parts in enumerate(collected)]
        more = await self._written(self._shape.whole, self._shape.scored_tokens(0))
        frame = {**self._frame, **more, "object": self._shape.kind}
        return msgspec.json.encode({**frame, "choices": choices, "usage": self._usage()})

    async def _choice(self, answer: Delta) -> msgspec.Raw:
        """A choice as JSON. Many log probabilities are written in a thread, because they are most of an answer."""

        def write() -> msgspec.Raw:
            return msgspec.Raw(msgspec.json.encode(self._shape.choice(answer)))

        await asyncio.sleep(0)
        return await self._written(write, len(answer.tokens) + self._shape.scored_tokens(answer.index))

    async def _written(self, write: Callable[[], T], tokens: int) -> T:
        """The result of `write`, which runs in a thread where it writes log probabilities of many tokens."""
        return await asyncio.to_thread(write) if tokens > TOKENS_AT_ONCE else write()

    async def _events(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        begun: set[int] = set()
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                if delta.index not in begun:
                    begun.add(delta.index)
                    if (event := await self._opening(delta.index)) is not None:
                        yield event
                yield self._event([self._shape.chunk(delta)])
        if self._body.include_usage:
            yield self._event([], usage=True)
        yield DONE

    async def _opening(self, index: int) -> bytes | None:
        def write() -> bytes | None:
            opening = self._shape.opening(index)
            return None if opening is None else self._event([opening], **self._shape.whole())

        return await self._written(write, self._shape.scored_tokens(index))

    def _event(self, choices: list[dict[str, Any]], *, usage: bool = False, **more: object) -> bytes:
        event = {**self._frame, **more, "object": self._shape.chunk_kind, "choices": choices}
        if self._body.include_usage:
            event["usage"] = self._usage() if usage or self._body.continuous_usage else None
        return sse(event)

    def _usage(self) -> dict[str, Any]:
        # a prompt counts once, however many answers it gets
        firsts = self._answers[:: self._body.num_choices]
        prompt = sum(len(answer.request.prompt_token_ids) for answer in firsts)
        completion = sum(answer.completion_tokens for answer in self._answers)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens or 0 for answer in firsts)},
        }
        if any(answer.parser is not None for answer in self._answers):
            reasoning = sum(answer.reasoning_tokens for answer in self._answers)
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return usage


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def shown_id(prefix: str, own: str, given: str | None) -> str:
    """The id of the response: it contains the client's `request_id`, if there is one.

    The engine knows the request by `own`, because two clients may send the same `request_id`.
    """
    return own if given is None else f"{prefix}-{given}"


def ending(delta: Delta) -> dict[str, Any]:
    """The two fields that say why an answer has ended; both are None before that."""
    reason = None if delta.finish_reason is None else delta.finish_reason.value
    return {"finish_reason": reason, "stop_reason": delta.stop_reason}
