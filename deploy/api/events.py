"""GET /admin/events: one look at the cluster for all pages that are open, and its changes as server-sent events.

Nobody looks while nobody listens. With listeners, the cluster is asked once in POLL_S, however many they are, and each
change is encoded once. A listener that does not read is cut after QUEUE events; it connects again and gets a snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import numpy as np
from fastapi import APIRouter
from ray.exceptions import RayError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from elastic_moe.cluster.errors import EmoeError, NotReadyError, RequestError
from elastic_moe.cluster.messages.views import EngineStatus
from elastic_moe.deploy.api.http_io import EventStream
from elastic_moe.deploy.api.service import Service, version
from elastic_moe.deploy.page.feed import (
    Section,
    State,
    Totals,
    change,
    load_rows,
    marks,
    operation_rows,
    placement_sections,
    sample,
    worker_rows,
)
from elastic_moe.deploy.web.openapi import described, text_answer

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 1.0
ROUTING_ROUNDS = 2
"""Rounds between two looks at the routing, and (below) at what changes seldom or costs little to see late."""
SELDOM_ROUNDS = 5
QUEUE = 16
HISTORY = 300
MAX_LISTENERS = 512
ENDED = ("completed", "failed")


class Look:
    """What was seen of the cluster last. `again` asks for what is due; what gives no answer stays as it was."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._round = 0
        self._totals: Totals | None = None
        self._imbalance: float | None = None
        self._marks: list[list[str]] = []
        """Of the next point: while there is no engine there are no points."""
        self.state: State = {"model": {"name": service.model_name, "version": version()}}

    async def again(self) -> Section | None:
        """One round. Returns the new point of the curves; None where there is no engine to ask."""
        backend, state = self._service.backend, dict(self.state)
        ready = await self._service.readiness()
        seldom = self._round % SELDOM_ROUNDS == 0
        changing = any(row["phase"] not in ENDED for row in state.get("operations", {}).values())
        engine, workers, operations, routing, scaling, counters = await asyncio.gather(
            _answer(backend.engine_status),
            _answer(backend.workers),
            _answer(backend.operations),
            _answer(backend.routing, self._round % ROUTING_ROUNDS == 0),
            _answer(backend.scaling, seldom),
            _answer(backend.counters, seldom or changing),
        )
        if workers is not None:
            state["workers"] = worker_rows(workers)
        if operations is not None:
            state["operations"] = operation_rows(operations)
            state["order"] = {"operations": [row.operation_id for row in operations]}
        if routing is not None:
            state["load"] = load_rows(routing.load)
            self._imbalance = float(np.mean(routing.load_imbalance)) if routing.load_imbalance else None
            state["window"] = {"tokens": routing.tokens, "window_s": routing.window_s}
        if scaling is not None:
            state["scale"] = {k: v for k, v in dataclasses.asdict(scaling).items() if v is not None}
        if counters is not None:
            state["counters"] = {
                "recoveries": sum(counters.recoveries.values()),
                "experts_moved": counters.experts_moved,
                "bytes_moved": counters.bytes_moved,
                "requests_moved": counters.requests_moved,
            }
        epoch = engine.epoch if engine is not None else None
        state |= await self._placement(state, seldom, epoch)
        if "layers" not in state["model"] and (info := await _answer(self._service.info)) is not None:
            shape = {"layers": info.num_layers, "experts": info.num_logical_experts, "top_k": info.top_k}
            more = {"architecture": info.architecture, "max_model_len": await self._service.max_model_len()}
            state["model"] = {**state["model"], **shape, **more}
        state["status"] = {"ready": ready.ready, "reason": ready.error or ready.reason}
        self._round += 1
        self._marks += marks(self.state, state)
        self.state = state
        return None if engine is None else self._point(engine)

    async def _placement(self, state: State, seldom: bool, epoch: int | None) -> State:
        known = state.get("placement", {}).get("epoch")
        changing = any(row["phase"] not in ENDED for row in state.get("operations", {}).values())
        due = seldom or changing or bool(state.get("moves")) or (epoch is not None and epoch != known)
        view = await _answer(self._service.backend.placement, due)
        return {} if view is None else placement_sections(view)

    def _point(self, engine: EngineStatus) -> Section:
        latency = self._service.metrics.latency
        totals = Totals(
            at_s=time.monotonic(),
            generation_tokens=engine.generation_tokens,
            prompt_tokens=engine.prompt_tokens,
            steps=engine.steps,
            **dataclasses.asdict(latency),
        )
        before, self._totals = self._totals, totals
        point = sample(before, totals, engine, time.time())
        if self._imbalance is not None:
            point["imbalance"] = round(self._imbalance, 3)
        if self._marks:
            point["marks"], self._marks = self._marks, []
        return point


class Listener:
    """One open page: the events that wait for it, and whether it was cut."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE)
        """None is the end."""
        self.cut = asyncio.Event()

    def send(self, event: bytes | None) -> None:
        try:
            self.events.put_nowait(event)
        except asyncio.QueueFull:
            self.cut.set()


class Hub:
    """Every listener of one replica, and the one task that looks for all of them."""

    def __init__(self, service: Service, poll_s: float = POLL_S) -> None:
        self._service = service
        self._poll_s = poll_s
        self._look = Look(service)
        self._listeners: set[Listener] = set()
        self._history: deque[Section] = deque(maxlen=HISTORY)
        self._looking: asyncio.Task[None] | None = None

    @property
    def is_looking(self) -> bool:
        return self._looking is not None

    def listen(self) -> Response:
        """The stream of one more page. Raises RequestError 503 where MAX_LISTENERS have one or the server stops."""
        if self._service.draining:
            raise NotReadyError("the server is shutting down")
        if len(self._listeners) >= MAX_LISTENERS:
            raise RequestError(
                f"{MAX_LISTENERS} pages follow the events already; close one", code="too_many_listeners", status=503
            )
        listener = Listener()
        return ListenerStream(self._events(listener), listener)

    async def _events(self, listener: Listener) -> AsyncGenerator[bytes, None]:
        self._listeners.add(listener)
        try:
            if self._looking is None:
                # what was seen before the pause is no longer true
                self._look = Look(self._service)
                self._looking = asyncio.create_task(self._keep_looking())
                self._looking.add_done_callback(self._stopped)
            else:
                listener.send(self._snapshot())
            while (event := await listener.events.get()) is not None:
                yield event
        finally:
            self._listeners.discard(listener)
            if not self._listeners and self._looking is not None:
                looking, self._looking = self._looking, None
                looking.cancel()

    async def _keep_looking(self) -> None:
        first = True
        while True:
            began = time.monotonic()
            before = self._look.state
            point = await self._seen()
            if point is not None:
                self._history.append(point)
            if first:
                self._tell(self._snapshot())
            else:
                changes = change(before, self._look.state)
                self._tell(_event("change", {"state": changes, "point": point}))
            first = False
            if self._service.draining:
                # Serve waits for requests under way, and these would never end
                self._tell(None)
            await asyncio.sleep(max(self._poll_s / 2, self._poll_s - (time.monotonic() - began)))

    async def _seen(self) -> Section | None:
        try:
            return await self._look.again()
        except (RayError, EmoeError):
            logger.exception("looking at the cluster for the page failed")
            return None

    def _tell(self, event: bytes | None) -> None:
        for listener in self._listeners:
            listener.send(event)

    def _snapshot(self) -> bytes:
        return _event("snapshot", {"state": self._look.state, "history": list(self._history)})

    def _stopped(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        logger.error("the look at the cluster for the page has ended", exc_info=task.exception())
        if self._looking is task:
            self._looking = None
            for listener in self._listeners:
                listener.cut.set()


class ListenerStream(EventStream):
    """Ends when its listener is cut, even where the page reads nothing and a send would wait for ever."""

    def __init__(self, events: AsyncGenerator[bytes, None], listener: Listener) -> None:
        super().__init__(events)
        self._cut = listener.cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = asyncio.create_task(super().__call__(scope, receive, send))
        cut = asyncio.create_task(self._cut.wait())
        try:
            await asyncio.wait({stream, cut}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (stream, cut):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await stream


async def _answer(question: Callable[[], Awaitable[T]], due: bool = True) -> T | None:
    """None where it is not due, or nobody can say at the moment."""
    if not due:
        return None
    try:
        return await question()
    except NotReadyError:
        return None


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


def events_router(service: Service) -> APIRouter:
    router = APIRouter()
    hub = Hub(service)

    @router.get("/admin/events", **described(answers={200: text_answer("Server-sent events.", "text/event-stream")}))
    async def events() -> Response:
        return hub.listen()

    return router
