"""Which requests run: those that a route has accepted, until their responses have been sent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from elastic_moe.deploy.web.running import Counted, Running


async def _receive() -> Message:
    return {"type": "http.disconnect"}


async def _send(message: Message) -> None: ...


def _run(route: Any, running: Running) -> None:
    asyncio.run(Counted(route, running=running)({"type": "http"}, _receive, _send))


def test_a_request_runs_from_its_acceptance_until_its_response_has_been_sent() -> None:
    running, seen = Running(), []

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(len(running))
        running.begin(scope)
        running.begin(scope)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        seen.append(len(running))

    _run(route, running)
    assert (seen, len(running)) == ([0, 1], 0)


def test_requests_that_are_refused_or_fail_do_not_run() -> None:
    running = Running()

    async def refused(scope: Scope, receive: Receive, send: Send) -> None:
        running.end(scope)
        running.begin(scope)
        running.end(scope)
        assert not len(running)

    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        running.begin(scope)
        raise ConnectionError

    _run(refused, running)
    with pytest.raises(ConnectionError):
        _run(failing, running)
    assert len(running) == 0
