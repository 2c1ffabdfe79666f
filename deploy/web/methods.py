"""Answers HEAD where a route has GET, and OPTIONS; `Allow` names every method that a path takes.

Routes are declared for one method each, so no route knows the others of its path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def methods_of(routes: Sequence[BaseRoute], scope: Scope) -> list[str]:
    """The methods for which the path of `scope` has a route."""
    return [method for method in METHODS if _has(routes, scope, method)]


def _has(routes: Sequence[BaseRoute], scope: Scope, method: str) -> bool:
    asked = {**scope, "method": method}
    return any(route.matches(asked)[0] is Match.FULL for route in routes)


class Methods:
    """ASGI middleware around the application whose `routes` it is given."""

    def __init__(self, app: ASGIApp, *, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] == "OPTIONS" and (allowed := self._allowed(scope)):
            await Response(status_code=204, headers={"Allow": allowed})(scope, receive, send)
        elif scope["method"] == "HEAD" and not self._has(scope, "HEAD") and self._has(scope, "GET"):
            await _head(self._app, {**scope, "method": "GET"}, receive, send)
        else:
            await self._app(scope, receive, self._naming_all(scope, send))

    def _has(self, scope: Scope, method: str) -> bool:
        return _has(self._routes, scope, method)

    def _allowed(self, scope: Scope) -> str:
        """The methods of the path as in `Allow`; empty where there is no such path."""
        found = methods_of(self._routes, scope)
        if "GET" in found and "HEAD" not in found:
            found.insert(1, "HEAD")
        return ", ".join([*found, "OPTIONS"]) if found else ""

    def _naming_all(self, scope: Scope, send: Send) -> Send:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 405:
                MutableHeaders(scope=message)["Allow"] = self._allowed(scope)
            await send(message)

        return named


async def _head(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Send the headers of a GET. The route is stopped before it sends a body, since a stream may have no end."""
    begun = asyncio.Event()

    async def headers_only(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            begun.set()
        # the body is thrown away

    answer = asyncio.ensure_future(_run(app, scope, receive, headers_only))
    started = asyncio.ensure_future(begun.wait())
    try:
        await asyncio.wait({answer, started}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            await answer
    finally:
        for task in (answer, started):
            task.cancel()
        await asyncio.gather(answer, started, return_exceptions=True)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)
