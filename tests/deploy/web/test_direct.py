"""The way past ASGI to a connection, in the uvicorn that is installed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http import httptools_impl

from elastic_moe.deploy.web.direct import DirectCycle, connection_of, serve_directly


class App:
    """Sends one part by ASGI, two directly, and one by ASGI again; says what the connection took."""

    def __init__(self) -> None:
        self.took: list[bool] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # as middleware does
        connection = connection_of({**scope, "path": "/"})
        assert connection is not None
        self.took.append(connection.takes_more)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        for part in (b"two ", b"three "):
            self.took.append(connection.takes_more)
            if self.took[-1]:
                connection.write(part)
        if scope["query_string"]:
            for _ in range(1000):
                if not connection.takes_more:
                    break
                connection.write(b"x" * 65536)
                # parts are sent when the loop goes on
                await asyncio.sleep(0)
        self.took.append(connection.takes_more)
        await send({"type": "http.response.body", "body": b"four", "more_body": False})
        self.took.append(connection.takes_more)


async def exchange(query: str, version: str, *, reads: bool = True) -> tuple[bytes, list[bool]]:
    app = App()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off", http="httptools"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
    writer.write(f"GET /{query} HTTP/{version}\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    if not reads:
        # nothing is read before the application has filled the connection
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        while len(app.took) < 4:
            await asyncio.sleep(0.001)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
    body = await reader.read(-1)
    writer.close()
    server.should_exit = True
    await serving
    return body.partition(b"\r\n\r\n")[2], app.took


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httptools_impl, "RequestResponseCycle", httptools_impl.RequestResponseCycle)
    serve_directly()
    assert httptools_impl.RequestResponseCycle is DirectCycle


def test_parts_are_chunks_in_order() -> None:
    body, took = asyncio.run(exchange("", "1.1"))
    assert body == b"4\r\none \r\n4\r\ntwo \r\n6\r\nthree \r\n4\r\nfour\r\n0\r\n\r\n"
    assert took == [False, True, True, True, False]


def test_a_client_without_chunks_takes_nothing_directly() -> None:
    assert asyncio.run(exchange("", "1.0")) == (b"one four", [False] * 5)


def test_a_client_that_reads_too_slowly_takes_nothing_more() -> None:
    body, took = asyncio.run(exchange("?fill", "1.1", reads=False))
    assert took == [False, True, True, False, False]
    assert body.endswith(b"4\r\nfour\r\n0\r\n\r\n")


def test_another_event_loop_does_not_write() -> None:
    cycle: Any = object.__new__(DirectCycle)
    cycle.loop = asyncio.new_event_loop()
    cycle.loop.close()

    async def found() -> Any:
        return connection_of({"emoe.connection": lambda: cycle}), connection_of({})

    assert asyncio.run(found()) == (None, None)
