"""GET /admin/events: the state of a group of workers as server-sent events, for all pages that are open.

While no page listens, nothing is asked. Otherwise the cluster is asked once in POLL_S, by one call, for all listeners
together, and each change is encoded once. A listener that does not read is cut off after QUEUE events; the page then
connects again and gets a snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import APIRouter
from ray.exceptions import RayError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.cluster.errors import EmoeError, NotReadyError, RequestError
from elastic_moe.cluster.messages.views import ClusterView, EngineStatus, Readiness, Revision
from elastic_moe.deploy.api.admin import EngineText, engine_number
from elastic_moe.deploy.api.http_io import EventStream
from elastic_moe.deploy.api.service import Service, version
from elastic_moe.deploy.page.feed import Section, State, Totals, change, marks, sample, sections
from elastic_moe.deploy.web.openapi import described, text_answer
from elastic_moe.optimizer import PLANNERS

logger = logging.getLogger(__name__)

POLL_S = 1.0
QUEUE = 16
"""Events that may wait for a listener."""
HISTORY = 300
"""Points of the curves that a new listener gets."""
MAX_LISTENERS = 512
DEFAULT_PLANNER = "auto"
"""The page offers it first."""


class Look:
    """The state of one group that was seen last. `again` asks the cluster, once, and updates the state."""

    def __init__(self, service: Service, engine: int = 0) -> None:
        """`engine`: number of the group."""
        self._service = service
        self._engine = engine
        self._known = Revision()
        self._totals: Totals | None = None
        self._imbalance: float | None = None
        self._marks: list[list[str]] = []
        """Marks of the next point. There are no points while no engine serves."""
        self.state: State = {
            "model": {"name": service.model_name, "version": version()},
            "planners": {"list": sorted(PLANNERS, key=lambda name: name != DEFAULT_PLANNER)},
            "engines": {"count": service.backend.num_groups, "number": engine},
        }

    async def again(self) -> Section | None:
        """Ask the cluster. Returns the new point of the curves; None if the engine has not reported since the last."""
        state, view = dict(self.state), await self._ask()
        count = self._service.backend.num_groups
        if count != state["engines"]["count"]:
            state["engines"] = {"count": count, "number": self._engine}
        if view is not None:
            state |= sections(view)
            self._known = view.revision
            if view.load is not None:
                self._imbalance = view.load.load_imbalance
        if "layers" not in state["model"]:
            state["model"] = state["model"] | await self._shape()
        ready = await self._readiness()
        state["status"] = {"ready": ready.ready, "reason": ready.error or ready.reason}
        if ready.resident < 1:
            state["status"]["resident"] = ready.resident
        self._marks += marks(self.state, state)
        self.state = state
        return None if view is None or view.status is None else self._point(view.status, view.status_at_s)

    async def _readiness(self) -> Readiness:
        """Whether the group serves; or why the whole server cannot."""
        whole = await self._service.readiness()
        if self._engine >= self._service.backend.num_groups:
            return Readiness(ready=False, reason="this group was retired, and is gone")
        return await self._service.backend.group(self._engine).readiness() if whole.ready else whole

    async def _ask(self) -> ClusterView | None:
        """None while nobody can answer."""
        if self._engine >= self._service.backend.num_groups:
            return None
        try:
            return await self._service.backend.group(self._engine).ask(Coordinator.cluster, self._known)
        except NotReadyError:
            return None

    async def _shape(self) -> Section:
        """The model's size; empty while it is not known."""
        try:
            info = await self._service.info()
            longest = await self._service.max_model_len()
        except NotReadyError:
            return {}
        return {
            "layers": info.num_layers,
            "experts": info.num_logical_experts,
            "top_k": info.top_k,
            "architecture": info.architecture,
            "max_model_len": longest,
        }

    def _point(self, engine: EngineStatus, at_s: float) -> Section | None:
        before = self._totals
        if before is not None and before.at_s == at_s:
            return None
        self._totals = Totals(
            at_s=at_s,
            generation_tokens=engine.generation_tokens,
            prompt_tokens=engine.prompt_tokens,
            steps=engine.steps,
            **dataclasses.asdict(self._service.metrics.latency),
        )
        point = sample(before, self._totals, engine, time.time())
        if self._imbalance is not None:
            point["imbalance"] = round(self._imbalance, 3)
        if self._marks:
            point["marks"], self._marks = self._marks, []
        return point


class Listener:
    """One open page: the events that wait for it, and whether it was cut off."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE)
        """None ends the stream."""
        self.cut = asyncio.Event()

    def send(self, event: bytes | None) -> None:
        try:
            self.events.put_nowait(event)
        except asyncio.QueueFull:
            self.cut.set()


class Hub:
    """The listeners of one group at one replica, and the task that asks the cluster for all of them."""

    def __init__(self, service: Service, poll_s: float = POLL_S, engine: int = 0) -> None:
        self._service = service
        self._poll_s = poll_s
        self._engine = engine
        self._look = Look(service, engine)
        self._listeners: set[Listener] = set()
        self._history: deque[Section] = deque(maxlen=HISTORY)
        self._looking: asyncio.Task[None] | None = None

    @property
    def is_looking(self) -> bool:
        return self._looking is not None

    def listen(self) -> Response:
        """A stream for one more page. Raises NotReadyError if the server stops, RequestError 503 for too many."""
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
                # the state from before the pause is out of date
                self._look = Look(self._service, self._engine)
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
                # Serve waits for the requests under way, and these would never end
                self._tell(None)
            await asyncio.sleep(max(self._poll_s / 2, self._poll_s - (time.monotonic() - began)))

    async def _seen(self) -> Section | None:
        try:
            return await self._look.again()
        except (RayError, EmoeError):
            logger.exception("the page's question to the cluster failed")
            return None

    def _tell(self, event: bytes | None) -> None:
        for listener in self._listeners:
            listener.send(event)

    def _snapshot(self) -> bytes:
        return _event("snapshot", {"state": self._look.state, "history": list(self._history)})

    def _stopped(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        logger.error("the task that asks the cluster for the page has failed", exc_info=task.exception())
        if self._looking is task:
            self._looking = None
            for listener in self._listeners:
                listener.cut.set()


class ListenerStream(EventStream):
    """Ends when its listener is cut off, even if the page reads nothing and a send would wait for ever."""

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


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


def events_router(service: Service) -> APIRouter:
    router = APIRouter()
    hubs: dict[int, Hub] = {}

    @router.get("/admin/events", **described(answers={200: text_answer("Server-sent events.", "text/event-stream")}))
    async def events(engine: EngineText = "0") -> Response:
        number = engine_number(engine, service.backend.num_groups)
        if number not in hubs:
            hubs[number] = Hub(service, engine=number)
        return hubs[number].listen()

    return router
