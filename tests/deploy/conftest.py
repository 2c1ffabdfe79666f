"""Fixtures of the HTTP tests: an API over a fake backend, in process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.service import Service
from tests.deploy.fakes import FakeBackend, make_tokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny-moe"
    make_tokenizer(directory)
    return directory


@asynccontextmanager
async def client_of(
    backend: FakeBackend, model_dir: Path, *, peer: tuple[str, int] = ("127.0.0.1", 1), **settings: Any
) -> AsyncGenerator[httpx.AsyncClient, None]:
    service = Service(ServeConfig.from_mapping(settings), backend, str(model_dir))
    await service.begin()
    transport = httpx.ASGITransport(app=create_app(service), client=peer)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client
    finally:
        service.close()


@pytest.fixture
def call(model_dir: Path) -> Callable[..., httpx.Response]:
    """call("POST", "/v1/completions", json=..., backend=..., config key=...) -> the response."""

    def run(
        method: str, path: str, *, backend: FakeBackend | None = None, config: dict[str, Any] | None = None, **how: Any
    ) -> httpx.Response:
        async def work() -> httpx.Response:
            async with client_of(backend or FakeBackend(), model_dir, **(config or {})) as client:
                return await client.request(method, path, **how)

        return asyncio.run(work())

    return run
