"""A stop under running requests: real coordinator, real replicas, in one process. Ray is never started."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.messages.requests import GenerateRequest, TokenOutput
from elastic_moe.cluster.messages.views import Readiness
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.backend.check_in import check_in
from tests.actors.fakes import Handle, PlainFleet
from tests.deploy.fakes import FakeBackend

ASKED = {"prompt": "the quick", "max_tokens": 3, "temperature": 0}


class Held(FakeBackend):
    """A request stays where `place` says until `go_on`: in the question whether the cluster is ready, or with the
    engine."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self._place = place
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

    async def _stay(self, place: str) -> None:
        if place == self._place:
            self.reached.set()
            await self.go_on.wait()

    async def readiness(self) -> Readiness:
        await self._stay("readiness")
        return await super().readiness()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        await self._stay("engine")
        async for output in super().generate(request):
            yield output


@contextlib.asynccontextmanager
async def replica(
    coordinator: Coordinator, name: str, model_dir: Path, place: str
) -> AsyncGenerator[tuple[Held, httpx.AsyncClient], None]:
    backend = Held(place)
    service = Service(ServeConfig(), backend, str(model_dir))
    await service.begin()
    checking = asyncio.create_task(check_in(Remote(Handle(coordinator)), name, service))
    transport = httpx.ASGITransport(create_app(service))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            yield backend, http
    finally:
        checking.cancel()
        service.close()


@pytest.mark.parametrize("place", ["readiness", "engine"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_a_stop_waits_for_requests_that_no_report_has_told_of(model_dir: Path, path: str, place: str) -> None:
    async def work() -> None:
        config = ServeConfig(api_replicas=2)
        coordinator = Coordinator(config, str(model_dir), PlainFleet(config))  # type: ignore[arg-type]
        ask = ASKED if path == "/v1/completions" else {"input": "the quick", "max_output_tokens": 3}
        async with (
            replica(coordinator, "one", model_dir, place) as (_, idle),
            replica(coordinator, "two", model_dir, place) as (backend, http),
        ):
            while len(coordinator._departure.crew._reports) < 2:
                await asyncio.sleep(0)
            running = asyncio.create_task(http.post(path, json=ask))
            await backend.reached.wait()
            for _ in range(100):
                assert await coordinator.stop_requests() >= 1
                await asyncio.sleep(0)
            # by now both replicas have been told
            for client in (idle, http):
                assert (await client.post(path, json=ask)).status_code == 503
            await asyncio.sleep(0.15)
            assert await coordinator.stop_requests() == 1
            backend.go_on.set()
            assert (await running).status_code == 200
            async with asyncio.timeout(10):
                while await coordinator.stop_requests():
                    await asyncio.sleep(0.01)
        await coordinator.shutdown()

    asyncio.run(work())
