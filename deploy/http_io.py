"""HTTP in and out: JSON bodies read with a limit, errors in OpenAI's form, server-sent events, and hang-ups noticed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from cluster.errors import ConflictError, NotReadyError, RequestError, UserError
from deploy.generation import GenerationFailed

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BODY_BYTES = 8 * 2**20
DISCARD_BYTES = 8 * MAX_BODY_BYTES
"""How much more of an oversized body is read, and thrown away, so that a client gets to read why it was refused."""

DONE = b"data: [DONE]\n\n"
RETRY_AFTER_S = 2


class ClientGone(Exception):
    """The client hung up; nobody is left to answer."""


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: BaseException) -> tuple[int, dict[str, Any]]:
    """HTTP status and OpenAI's error object for an exception. What is not ours is logged and not shown."""
    match error:
        case RequestError():
            return error.status, error_body(str(error), _kind(error.status), param=error.param, code=error.code)
        case UserError():
            return 400, error_body(str(error), _kind(400))
        case ConflictError():
            return 409, error_body(str(error), _kind(409), code="operation_in_progress")
        case NotReadyError():
            return 503, error_body(str(error), _kind(503), code="not_ready")
        case GenerationFailed():
            return 500, error_body(str(error), _kind(500), code="generation_failed")
        case HTTPException():
            text = {404: "no such route", 405: "this route does not take that method"}.get(error.status_code)
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
            return error.status_code, error_body(text or str(error.detail), _kind(error.status_code), code=code)
    logger.error("internal error", exc_info=error)
    return 500, error_body("internal error; the server's log says more", _kind(500), code="internal_error")


def _kind(status: int) -> str:
    special = {401: "authentication_error", 403: "permission_error", 409: "conflict_error", 503: "service_unavailable"}
    return special.get(status, "server_error" if status >= 500 else "invalid_request_error")


def error_response(error: BaseException) -> JSONResponse:
    status, body = describe(error)
    headers = dict(getattr(error, "headers", None) or {})
    if status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)


def install_error_handlers(app: FastAPI) -> None:
    async def handle(_: Request, error: Exception) -> Response:
        return error_response(error)

    for kind in (UserError, ConflictError, NotReadyError, GenerationFailed, HTTPException):
        app.add_exception_handler(kind, handle)

    async def hung_up(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    app.add_exception_handler(ClientGone, hung_up)


async def read_json(request: Request) -> Any:
    """The body, decoded. Raises RequestError: 413 for more than MAX_BODY_BYTES, 415 for another type, 400 otherwise."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise RequestError(f"Content-Type: expected application/json, got {kind[:80]}", status=415)
    body = bytearray()
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            body.clear()
            if size > DISCARD_BYTES:
                break
        else:
            body += part
    if size > MAX_BODY_BYTES:
        raise RequestError(
            f"the body is larger than {MAX_BODY_BYTES // 2**20} MB", code="request_too_large", status=413
        )
    return _decode(bytes(body))


def _decode(body: bytes) -> Any:
    if not body.strip():
        raise RequestError("the body is empty; expected a JSON object", code="invalid_json")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} is wrong", code="invalid_json") from None
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise RequestError(f"the body is no JSON: {error}", code="invalid_json") from None
    if "\\u" in text:
        # half a surrogate pair is fine in JSON, but no text
        try:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            message = "the body has an escaped surrogate without its other half"
            raise RequestError(message, code="invalid_json") from None
    return data


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up (raises ClientGone then).

    The body must have been read: what comes after it on the connection is the hang-up.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_hang_up(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _cancel(task, watcher)


class EventStream(Response):
    """Server-sent events, each sent at once. Closes `events` when the client hangs up, however long the next one takes.

    An exception in `events` becomes a last event with the error object: the status has been sent by then.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Response thinks of an empty body
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send(send))
        watcher = asyncio.create_task(_hang_up(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(sender, watcher)
            await self._events.aclose()
        if not sender.cancelled() and (error := sender.exception()) and not isinstance(error, OSError):
            raise error

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except OSError:
            raise  # the connection is gone
        except Exception as error:  # noqa: BLE001 - whatever it is, the client must learn that the stream is over
            event = sse(describe(error)[1]) + DONE
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def sse(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)


async def first_then_rest(stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Waits for the first item, so that an error before it can still be an HTTP status, and puts it back."""
    first = await anext(stream, None)

    async def again() -> AsyncGenerator[T, None]:
        async with contextlib.aclosing(stream):
            if first is not None:
                yield first
            async for item in stream:
                yield item

    return again()
