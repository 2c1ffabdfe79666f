"""Two API replicas in one process, with one engine and one store, and clients of each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from elastic_moe.actors.remote.ask import Remote
from elastic_moe.actors.remote.key_value import LocalKeyValue
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.backend.groups import Groups
from elastic_moe.deploy.backend.ray_backend import RayBackend
from tests.deploy.backend.standins import ENGINES, Coordinator, Engine, until


class LetterEngine(Engine):
    """Its tokens are letters."""

    first = 66


@dataclass(slots=True)
class Replica:
    backend: Groups
    service: Service
    client: httpx.AsyncClient
    watching: asyncio.Task[None]

    async def kill(self) -> None:
        """As a death does: its connections end, and nothing is tidied up."""
        self.watching.cancel()
        self.service.following._background.cancel()
        self.backend._watch.cancel()
        self.backend.group(0)._background.cancel()
        await asyncio.sleep(0)

    async def create(self, **body: Any) -> dict[str, Any]:
        response = await self.client.post("/v1/responses", json={"input": "hello", **body})
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def get(self, response_id: str) -> dict[str, Any]:
        response = await self.client.get(f"/v1/responses/{response_id}")
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def events(self, response_id: str, after: int | None = None) -> list[dict[str, Any]]:
        query = {"stream": "true"} | ({} if after is None else {"starting_after": str(after)})
        return events_of(await self.client.get(f"/v1/responses/{response_id}", params=query))


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    events = []
    for block in response.text.split("\n\n"):
        if block:
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


@dataclass(slots=True)
class Scene:
    engine: LetterEngine
    coordinator: Coordinator
    values: LocalKeyValue
    model_dir: Path
    settings: dict[str, Any]
    replicas: list[Replica]

    async def add(self) -> Replica:
        backend = Groups(1, self._group)
        service = Service(ServeConfig(**self.settings), backend, str(self.model_dir), values=self.values)
        await service.begin()
        backend.begin()
        client = httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://localhost")
        watching = asyncio.create_task(service.following.watch())
        replica = Replica(backend=backend, service=service, client=client, watching=watching)
        self.replicas.append(replica)
        await until(lambda: backend.group(0).engine.current is not None and backend.can_wait)
        return replica

    def _group(self, number: int, lost: Callable[[], None]) -> RayBackend:
        return RayBackend(Remote(self.coordinator), recovery_timeout_s=600, number=number, lost=lost)

    def new_engine(self) -> LetterEngine:
        self.engine.kill()
        self.coordinator.current = self.engine = LetterEngine()
        return self.engine


def run(scenario: Callable[[Scene, Replica, Replica], Awaitable[None]], model_dir: Path, **settings: Any) -> None:
    async def work() -> None:
        engine = LetterEngine()
        scene = Scene(engine, Coordinator(engine), LocalKeyValue(), model_dir, settings, [])
        try:
            # the first one imports the tokenizer's library, which takes long on a busy machine
            replicas = await scene.add(), await scene.add()
            async with asyncio.timeout(60):
                await scenario(scene, *replicas)
        finally:
            for replica in scene.replicas:
                replica.watching.cancel()
                replica.service.close()
                await replica.backend.end()
                await replica.client.aclose()
            while ENGINES:
                ENGINES.pop().end()
            await asyncio.sleep(0)

    asyncio.run(work())
