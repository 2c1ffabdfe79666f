"""A coordinator and an engine that are Ray actors and do nothing but count upwards: for tests of what is between."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray

from elastic_moe.actors.engine.clients import Clients
from elastic_moe.actors.remote.ask import Remote, kill
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.facts.counters import ClusterCounters
from elastic_moe.cluster.messages.requests import Endpoint, FinishReason, GenerateRequest, RequestId, TokenOutput
from elastic_moe.cluster.messages.views import ClusterView, EngineStatus, Readiness, Revision
from tests.deploy.fakes import FakeBackend


class FakeEngine:
    """Token n of an answer is (first prompt token + n) modulo 26, as a letter. One token per `step_s`."""

    def __init__(self, step_s: float = 0.01) -> None:
        self._step_s = step_s
        self._running: dict[RequestId, tuple[GenerateRequest, int]] = {}
        self._clients = Clients(self, submitted=lambda: None)
        self._endpoint: Endpoint | None = None
        self._steps = 0
        self._loop: asyncio.Task[None] | None = None

    async def endpoint(self) -> Endpoint:
        if self._endpoint is None:
            self._endpoint = await self._clients.listen("127.0.0.1")
            self._loop = asyncio.create_task(self._work())
        return self._endpoint

    def add(self, request: GenerateRequest) -> TokenOutput | None:
        if len(request.prompt_token_ids) > 100:
            raise RequestError("does not fit into the KV cache", param="prompt", code="context_length_exceeded")
        self._running[request.request_id] = (request, len(request.output_token_ids))
        return None

    def abort(self, request_id: RequestId) -> bool:
        return self._running.pop(request_id, None) is not None

    async def status(self) -> EngineStatus:
        return EngineStatus(steps=self._steps, waiting=len(self._running))

    async def _work(self) -> None:
        due = time.monotonic()
        while True:
            due += self._step_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._steps += 1
            self._clients.deliver([self._next(request_id) for request_id in list(self._running)])

    def _next(self, request_id: RequestId) -> TokenOutput:
        request, made = self._running[request_id]
        ends = made + 1 >= request.params.max_tokens
        if ends:
            del self._running[request_id]
        else:
            self._running[request_id] = (request, made + 1)
        return TokenOutput(
            request_id=request.request_id,
            offset=made,
            token_ids=(66 + (request.prompt_token_ids[0] + made) % 26,),
            finish_reason=FinishReason.LENGTH if ends else None,
        )


class FakeCoordinator:
    """Answers as FakeBackend does; `lose_engine` kills the engine, the next question for it makes another."""

    def __init__(self, step_s: float = 0.01) -> None:
        self._backend = FakeBackend()
        self._step_s = step_s
        self._engine: Remote[Any] | None = None

    async def engine(self) -> Remote[Any]:
        if self._engine is None:
            actor = ray.remote(FakeEngine).options(num_cpus=0, max_concurrency=1000)
            self._engine = Remote(actor.remote(self._step_s))
        return self._engine

    async def lose_engine(self, successor_after_s: float) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            kill(engine)
        await asyncio.sleep(successor_after_s)

    async def readiness(self) -> Readiness:
        return await self._backend.readiness()

    async def model_info(self) -> Any:
        return await self._backend.model_info()

    async def placement(self) -> Any:
        return await self._backend.placement()

    async def routing(self) -> Any:
        return await self._backend.routing()

    async def workers(self) -> Any:
        return await self._backend.workers()

    async def cluster(self, known: Revision) -> ClusterView:
        return await self._backend.cluster(known)

    async def rebalance(self, planner: str, dry_run: bool) -> Any:
        return await self._backend.rebalance(planner, dry_run)

    async def scale(self, *arguments: Any) -> Any:
        return await self._backend.scale(*arguments)

    async def place(self, *arguments: Any) -> Any:
        return await self._backend.place(*arguments)

    async def scaling(self) -> Any:
        return await self._backend.scaling()

    async def unpin(self) -> None:
        await self._backend.unpin()

    async def operations(self) -> Any:
        return await self._backend.operations()

    async def operation(self, operation_id: str) -> Any:
        return await self._backend.operation(operation_id)

    async def counters(self) -> ClusterCounters:
        return await self._backend.counters()

    async def shutdown(self) -> None:
        await self.lose_engine(0)


def start_fake_cluster(config: ServeConfig, model_dir: str) -> Remote[Any]:
    return Remote(
        ray.remote(FakeCoordinator)
        .options(
            name="coordinator",
            namespace="emoe",
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=1000,
        )
        .remote()
    )
