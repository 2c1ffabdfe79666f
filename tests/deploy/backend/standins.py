"""Stand-ins for Ray's handles: an engine with its real side of API replicas, and a coordinator that names it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import ActorDiedError, RayTaskError

from elastic_moe.actors.engine.clients import Clients
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.errors import NotReadyError, RequestError
from elastic_moe.cluster.facts.counters import ClusterCounters
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.messages.requests import Endpoint, FinishReason, GenerateRequest, TokenOutput
from elastic_moe.cluster.messages.views import EngineStatus, Readiness, RoutingView, ScaleView, WorkerView
from tests.deploy.fakes import FakeBackend

ENGINES: list[Engine] = []
"""Those that listen, to be ended with the test."""


class Method:
    """`handle.method.remote(...)`, as an awaitable; raises what a dead actor or a failed task raises."""

    def __init__(self, actor: Actor, work: Callable[..., Awaitable[Any]]) -> None:
        self._actor = actor
        self._work = work

    async def remote(self, *args: Any) -> Any:
        await asyncio.sleep(0)
        if self._actor.dead.is_set():
            raise ActorDiedError
        task = asyncio.ensure_future(self._work(*args))
        death = asyncio.ensure_future(self._actor.dead.wait())
        await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED)
        death.cancel()
        if not task.done():
            task.cancel()
            raise ActorDiedError
        if (error := task.exception()) is not None:
            raise RayTaskError("method", "traceback", error)
        return task.result()


class Actor:
    def __init__(self) -> None:
        self.dead = asyncio.Event()

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        remote = asyncio.iscoroutinefunction(value) and not name.startswith("_")
        return Method(self, value) if remote else value


class Engine(Actor):
    """Token n of an answer is `first` + n. Makes tokens only when `steps` allows."""

    first = 100

    def __init__(self) -> None:
        super().__init__()
        self.running: dict[str, tuple[GenerateRequest, int]] = {}
        self.submitted: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.steps = asyncio.Semaphore(0)
        self.started = True
        self.refuses = False
        self.drops = 0
        self.load = EngineStatus()
        """What it says of its requests."""
        self.silent = False
        """It does not say it."""
        self.clients = Clients(self, submitted=lambda: None)
        self.address: Endpoint | None = None
        self.opening = asyncio.Lock()
        self.work: asyncio.Task[None] | None = None

    def kill(self) -> None:
        self.dead.set()
        self.clients.close()

    def hang(self) -> None:
        """The connections stay, and nothing is read from them."""
        for link in self.clients._names:
            assert link._transport is not None
            link._transport.pause_reading()

    def end(self) -> None:
        self.kill()
        if self.work is not None:
            self.work.cancel()

    async def endpoint(self) -> Endpoint:
        if not self.started:
            raise NotReadyError("the engine has not been started")
        async with self.opening:
            if self.address is None:
                self.address = await self.clients.listen("127.0.0.1")
                ENGINES.append(self)
                self.work = asyncio.get_running_loop().create_task(self._work())
        return self.address

    async def status(self) -> EngineStatus:
        if self.silent:
            await asyncio.sleep(3600)
        return self.load

    def add(self, request: GenerateRequest) -> TokenOutput | None:
        if self.refuses:
            raise RequestError("too long", param="prompt")
        self.submitted.append(request)
        self.running[request.request_id] = (request, len(request.output_token_ids))
        return None

    def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return self.running.pop(request_id, None) is not None

    async def _work(self) -> None:
        while True:
            while not self.running:
                await asyncio.sleep(0.001)
            await self.steps.acquire()
            outputs = [self._next(request_id) for request_id in list(self.running)]
            if self.drops == 0:
                self.clients.deliver(outputs)
            self.drops = max(0, self.drops - 1)
            await asyncio.sleep(0)

    def _next(self, request_id: str) -> TokenOutput:
        request, made = self.running[request_id]
        ends = made + 1 == request.params.max_tokens
        self.running[request_id] = (request, made + 1)
        if ends:
            del self.running[request_id]
        return TokenOutput(
            request_id=request.request_id,
            offset=made,
            token_ids=(self.first + made,),
            finish_reason=FinishReason.LENGTH if ends else None,
        )


class Coordinator(Actor):
    def __init__(self, engine: Engine | None) -> None:
        super().__init__()
        self.current = engine
        self.hangs = False
        self.reason: str | None = None
        """Why the workers cannot serve, although there is an engine."""
        self.left: list[str] = []
        """The API replicas that have checked out."""
        self.stalls = False
        """The whole process stands still for 0.15 s, once, while an answer is under way."""

    async def engine(self) -> Remote[Any] | None:
        return None if self.current is None else Remote(self.current)

    async def check_out(self, replica: str) -> int:
        self.left.append(replica)
        return 0

    async def operations(self) -> list[Any]:
        return []

    async def model_info(self) -> ModelInfo:
        return await FakeBackend().model_info()

    async def workers(self) -> list[WorkerView]:
        return await FakeBackend().workers()

    async def scaling(self) -> ScaleView:
        return await FakeBackend().scaling()

    async def routing(self) -> RoutingView:
        return await FakeBackend().routing()

    async def counters(self) -> ClusterCounters:
        return await FakeBackend().counters()

    async def readiness(self) -> Readiness:
        if self.hangs:
            await asyncio.sleep(3600)
        if self.stalls:
            self.stalls = False
            time.sleep(0.15)
            for _ in range(4):
                await asyncio.sleep(0)
        if self.reason is not None:
            return Readiness(ready=False, reason=self.reason)
        return Readiness(ready=self.current is not None, reason="serving")


def release(engine: Engine, steps: int) -> None:
    for _ in range(steps):
        engine.steps.release()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)
