"""Writes HTTP responses: errors in OpenAI's form and server-sent events. Notices clients that hang up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from elastic_moe.cluster.errors import ConflictError, NotReadyError, RequestError, UserError
from elastic_moe.cluster.lines import meant, single_line
from elastic_moe.deploy.backend.backend import GenerationFailed
from elastic_moe.deploy.generation.shortcut import Shortcut
from elastic_moe.deploy.web.direct import connection_of
from elastic_moe.deploy.web.methods import methods_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

INSTEAD = {
    "/admin/config": "POST /admin/scale changes the number of workers, POST /admin/engines the number of groups, and"
    " other settings take a redeploy, or a restart of `emoe serve`",
    "/admin/workers": "POST /admin/scale changes their number, and retires some by name",
}
"""What to call where a path that only tells is asked to change something."""
OF_OTHER_SERVERS = frozenset(
    (
        *("assistants", "audio", "batches", "classify", "embeddings", "evals", "files", "fine_tuning", "images"),
        *("moderations", "pooling", "realtime", "rerank", "score", "threads", "uploads", "vector_stores", "videos"),
    )
)
"""First parts of the paths of OpenAI's and vLLM's calls that a server of text generation has not."""
WELL_KNOWN = (
    *("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"),
    *("/health", "/ready", "/version", "/metrics", "/admin/config", "/admin/engines", "/admin/operations"),
    *("/admin/placement", "/admin/rebalance", "/admin/routing", "/admin/scale", "/admin/workers"),
)
"""Paths that a mistyped one may have been meant to be."""
DONE = b"data: [DONE]\n\n"
RETRY_AFTER_S = 2
SLOW_READER_S = 15.0
"""Seconds without reading after which a client is cut off; it takes at most twice as long to notice."""


class ClientGone(Exception):
    """The client has hung up, so there is nobody to answer."""


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@contextlib.contextmanager
def naming(*fields: str, **others: str) -> Iterator[None]:
    """A refusal of the cluster's, whose message begins with a field's name, names the field in `param` too.

    `fields`: those of the request; a message may name a part of one, such as workers.0.slots, and begin with placement,
    which is the whole body. `others`: where the request has another name for it than the cluster.
    """
    try:
        yield
    except RequestError:
        raise
    except UserError as error:
        name = str(error).removeprefix("placement: ").partition(":")[0]
        known = name if name.partition(".")[0] in fields else None
        raise RequestError(str(error), param=others.get(name, known)) from None


def describe(error: BaseException) -> tuple[int, dict[str, Any]]:
    """HTTP status and OpenAI's error object for an exception. An unexpected one is logged, and its text is not
    shown."""
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
            return error.status_code, error_body(str(error.detail), _kind(error.status_code))
    logger.error("internal error", exc_info=error)
    return 500, error_body("internal error; the server's log says more", _kind(500), code="internal_error")


def _kind(status: int) -> str:
    special = {
        401: "authentication_error",
        403: "permission_error",
        408: "timeout_error",
        409: "conflict_error",
        503: "service_unavailable",
    }
    return special.get(status, "server_error" if status >= 500 else "invalid_request_error")


def error_response(error: BaseException) -> JSONResponse:
    status, body = describe(error)
    headers = dict(getattr(error, "headers", None) or {})
    if status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)


def _path_of(request: Request) -> str:
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", ""))


def _no_route(request: Request) -> RequestError:
    """For a path that is not served. Most often the base URL of a client lacks /v1, or has it twice."""
    path = _path_of(request)
    name = path.removeprefix("/v1/").partition("/")[0]
    hint = "; this server only generates text" if name in OF_OTHER_SERVERS else meant(path, WELL_KNOWN)
    text = f"no such route: {single_line(path[:100])}{hint}; /docs lists all"
    return RequestError(text, code="not_found", status=404)


def _other_method(request: Request) -> RequestError:
    path = _path_of(request)
    taken = " and ".join(methods_of(request.app.router.routes, request.scope))
    hint = f"; {INSTEAD[path]}" if path in INSTEAD else ""
    text = f"this route takes {taken}, not {request.method}{hint}"
    return RequestError(text, code="method_not_allowed", status=405)


def install_error_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 405:
            error = _other_method(request)
        elif isinstance(error, HTTPException) and error.status_code == 404:
            error = _no_route(request)
        return error_response(error)

    for kind in (UserError, ConflictError, NotReadyError, GenerationFailed, HTTPException):
        app.add_exception_handler(kind, handle)

    async def hung_up(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    app.add_exception_handler(ClientGone, hung_up)


def client_name(request: Request) -> str:
    """The name by which a client is counted: its address, since all clients may have the same key."""
    return request.client.host if request.client else ""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Where the client hangs up, `work` is cancelled and ClientGone is raised.

    The body must have been read: the next message on the connection is then the hang-up.
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
    """Server-sent events, each sent at once. `events` is closed as soon as the client hangs up.

    An exception in `events` becomes a last event with the error object, because the status was sent already.
    A client that reads nothing for `SLOW_READER_S` is cut off, because it takes places in the engine from others.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], shortcut: Shortcut | None = None) -> None:
        """`shortcut` gets the connection, and writes to it while `events` has nothing to send."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Response has set it for an empty body
        del self.headers["content-length"]
        self._events = events
        self._shortcut = shortcut
        self._sending = False
        self._sent = 0
        """Number of events that the connection has taken."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._shortcut is not None:
            self._shortcut.connection = connection_of(scope)
        sender = asyncio.create_task(self._send(send))
        watcher = asyncio.create_task(_hang_up(receive))
        try:
            await self._until_over(sender, watcher)
        finally:
            await _cancel(sender, watcher)
            await self._events.aclose()
        if not sender.cancelled() and (error := sender.exception()) and not isinstance(error, OSError):
            raise error

    async def _until_over(self, *tasks: asyncio.Task[None]) -> None:
        """Wait until one of `tasks` has ended, or the client has read nothing between two looks."""
        seen = -1
        while True:
            done, _ = await asyncio.wait(tasks, timeout=SLOW_READER_S, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return
            if self._sending and self._sent == seen:
                logger.warning("a client is cut off, because it has read nothing for %g s", SLOW_READER_S)
                return
            seen = self._sent if self._sending else -1

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                self._sending = True
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._sending = False
                self._sent += 1
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
    """`stream`, after its first item has come, so that an error before that can still become an HTTP status."""
    first = await anext(stream, None)

    async def again() -> AsyncGenerator[T, None]:
        async with contextlib.aclosing(stream):
            if first is not None:
                yield first
            async for item in stream:
                yield item

    return again()
