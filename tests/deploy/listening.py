"""An API over a fake backend that listens on a port, for clients of their own."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path

import uvicorn

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.service import Service
from tests.deploy.fakes import FakeBackend


class Server:
    """An API over a fake backend, on a free port, in a thread."""

    def __init__(self, backend: FakeBackend, model_dir: Path) -> None:
        self.backend = backend
        self._model_dir = model_dir
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._uvicorn: uvicorn.Server | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _run(self) -> None:
        service = Service(ServeConfig(api_key="key"), self.backend, str(self._model_dir))
        await service.begin()
        config = uvicorn.Config(create_app(service), port=self.port, log_level="error", ws="none", lifespan="off")
        self._uvicorn = uvicorn.Server(config)
        await self._uvicorn.serve()

    def __enter__(self) -> Server:
        self._thread.start()
        deadline = time.monotonic() + 30
        while not (self._uvicorn and self._uvicorn.started):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._uvicorn is not None
        self._uvicorn.should_exit = True
        self._thread.join(10)
