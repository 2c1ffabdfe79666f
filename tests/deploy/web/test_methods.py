"""HEAD, OPTIONS and `Allow`, through the whole application."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from elastic_moe.deploy.web.methods import Methods

Call = Callable[..., httpx.Response]


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/", "/page/app.js", "/metrics", "/nothing", "/v1/models/x"])
def test_head_has_the_headers_of_get(call: Call, path: str) -> None:
    got, head = call("GET", path), call("HEAD", path)
    assert head.status_code == got.status_code
    assert head.content == b""
    assert head.headers.get("content-type") == got.headers.get("content-type")
    assert head.headers["content-length"] == got.headers["content-length"] or path == "/metrics"


def test_head_of_a_stream_without_an_end() -> None:
    app = FastAPI()
    closed = asyncio.Event()

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def forever():  # type: ignore[no-untyped-def]
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0.01)
            finally:
                closed.set()

        return StreamingResponse(forever())

    app.add_middleware(Methods, routes=app.router.routes)

    async def work() -> None:
        async with (
            asyncio.timeout(5),
            httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://a") as client,
        ):
            assert (await client.head("/stream")).content == b""

    asyncio.run(work())


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/completions", "POST, OPTIONS"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/ping", "GET, HEAD, POST, OPTIONS"),
        ("/admin/placement", "GET, HEAD, PUT, OPTIONS"),
        ("/admin/scale", "GET, HEAD, POST, OPTIONS"),
    ],
)
def test_allow_names_every_method(call: Call, path: str, methods: str) -> None:
    options = call("OPTIONS", path)
    assert (options.status_code, options.headers["allow"], options.content) == (204, methods, b"")
    refused = call("DELETE", path)
    assert (refused.status_code, refused.headers["allow"]) == (405, methods)
    assert refused.json()["error"]["code"] == "method_not_allowed"


def test_no_route_has_no_methods(call: Call) -> None:
    assert call("OPTIONS", "/nothing").status_code == 404
