"""The requests that run: each from its acceptance to the last byte of its response.

A route says when it accepts a request; `Counted`, the middleware, knows when its response has been sent.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

TICKET = "emoe.ticket"
"""The key, in the scope of a request, of the object that stands for the request."""


class Running:
    """The running requests of one replica, on one event loop."""

    def __init__(self) -> None:
        self._tickets: set[object] = set()

    def __len__(self) -> int:
        return len(self._tickets)

    def begin(self, scope: Scope) -> None:
        """The request runs from now on, until its response has been sent, or its client has hung up."""
        self._tickets.add(scope[TICKET])

    def end(self, scope: Scope) -> None:
        """Harmless where the request does not run."""
        self._tickets.discard(scope[TICKET])


class Counted:
    """ASGI middleware around the routes that call `running.begin`."""

    def __init__(self, app: ASGIApp, *, running: Running) -> None:
        self._app = app
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, TICKET: object()}
        try:
            await self._app(scope, receive, send)
        finally:
            self._running.end(scope)
