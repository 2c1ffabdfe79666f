"""The real Backend: the coordinator and the engine as Ray actors.

Guarantee: a request that the engine has accepted ends with its full answer, unless this process dies or the cluster
does not serve for `recovery_timeout_s`. The tokens that each request has got are kept here. When the engine is lost,
every unfinished request is submitted to the next engine together with its tokens, and `offset` says which tokens of the
new engine are repeats. Meanwhile the request's stream pauses.

    generate() -> Submit to the engine          Outputs from the engine -> the requests' queues -> generate()

A lasting request outlives this process too: the engine keeps its tokens, and another replica may `generate` it again.

Requests and outputs travel over one connection to the engine; everything else is a call to the coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Sequence
from itertools import chain
from typing import TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError

from elastic_moe.actors.control.coordinator import Coordinator
from elastic_moe.actors.engine.engine import Engine
from elastic_moe.actors.liveness import ADOPT_S, CALL_TIMEOUT_S, HANG_S, LIFE_S, dry_run_timeout_s
from elastic_moe.actors.loop_watch import LoopWatch
from elastic_moe.actors.remote.ask import Remote, ask, kill
from elastic_moe.actors.remote.background import Background
from elastic_moe.actors.remote.calls import within
from elastic_moe.actors.remote.codec import Message
from elastic_moe.actors.remote.links import Link, connect
from elastic_moe.cluster.errors import EmoeError, NotReadyError, RequestError
from elastic_moe.cluster.facts.counters import ClusterCounters
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.messages.requests import (
    AbortRequests,
    Adopt,
    Adopted,
    CancelRequests,
    GenerateRequest,
    Hello,
    Outputs,
    RequestId,
    Submit,
    TokenOutput,
)
from elastic_moe.cluster.messages.views import (
    ClusterView,
    ConfigView,
    EngineStatus,
    Operation,
    PlacementView,
    Readiness,
    RebalancePreview,
    Revision,
    RoutingView,
    ScaleView,
    WorkerView,
)
from elastic_moe.cluster.placement import Placement, WorkerId
from elastic_moe.deploy.generation.answer import GenerationFailed
from elastic_moe.deploy.generation.gcs_watch import LOOK_S, GcsWatch
from elastic_moe.deploy.generation.request_stream import RequestStream

logger = logging.getLogger(__name__)

R = TypeVar("R")

MAX_UNREAD = 2**21
"""Most tokens and log probabilities of all requests that clients have not read yet: some 200 MB."""
UNREAD_EVERY = 64
"""Number of messages from the engine between two checks of `MAX_UNREAD`."""
RETRY_S = 0.1
READINESS_S = 0.25
"""Seconds between two questions whether the cluster is ready, until it is; then four times as many."""


class RayBackend:
    """Made and used on one event loop. `begin` starts its tasks; `end` stops them."""

    def __init__(
        self,
        coordinator: Remote[Coordinator],
        *,
        plan_deadline_s: float,
        recovery_timeout_s: float,
        gcs: GcsWatch | None = None,
    ) -> None:
        """recovery_timeout_s: seconds without a serving cluster after which requests end with an error. They do so too
        when `gcs`, if given, says that Ray's GCS is lost.
        """
        self._gcs = gcs
        self._coordinator = coordinator
        self._dry_run_timeout_s = dry_run_timeout_s(plan_deadline_s)
        self._recovery_timeout_s = recovery_timeout_s
        self._served_at = 0.0
        """When the cluster was last seen to serve."""
        self._has_served = False
        self._client_id = uuid.uuid4().hex
        self._streams: dict[RequestId, RequestStream] = {}
        self._engine: Remote[Engine] | None = None
        self._link: Link | None = None
        self._linked_at = 0.0
        self._readiness = Readiness(ready=False, reason="starting")
        self._resumed = 0
        self._messages = 0
        self._background = Background(_has_failed)

    def begin(self) -> None:
        for work in (self._watch_readiness(), self._follow_engines(), LoopWatch("an API replica").watch()):
            self._background.start(work)
        if self._gcs is not None:
            self._background.start(self._watch_gcs(self._gcs))

    def expect_service(self) -> None:
        """From now on requests may wait for the cluster to serve, although it has not done so yet."""
        self._has_served, self._served_at = True, time.monotonic()

    async def end(self) -> None:
        self._background.cancel()
        await self._background.settle()

    # --- Requests -----------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        stream = RequestStream(request)
        self._streams[request.request_id] = stream
        ended = False
        try:
            await self._submit(self._link, stream)
            while not ended:
                output = await stream.next()
                ended = output.finish_reason is not None
                yield output
        finally:
            del self._streams[request.request_id]
            if not ended and stream.link is not None:
                stream.link.send(AbortRequests(request_ids=(request.request_id,)))

    def cancel(self, request_id: RequestId) -> None:
        stream = self._streams[request_id]
        stream.cancelled = True
        if stream.link is not None:
            stream.link.send(CancelRequests(request_ids=(request_id,)))

    async def orphans(self, request_ids: Sequence[RequestId]) -> tuple[RequestId, ...]:
        # a new engine knows a request only once those who follow it have submitted it again
        if self._link is None or time.monotonic() - self._linked_at < ADOPT_S:
            return ()
        try:
            answer = await within(self._link.call(Adopt(request_ids=tuple(request_ids))), CALL_TIMEOUT_S)
        except (ConnectionError, TimeoutError):
            return ()
        assert isinstance(answer, Adopted), answer
        return answer.request_ids

    def forget(self, request_id: RequestId) -> None:
        if self._link is not None:
            self._link.send(AbortRequests(request_ids=(request_id,)))

    async def _submit(self, link: Link | None, stream: RequestStream) -> None:
        """Raises RequestError if the engine refuses it. The next engine gets it if this one is gone."""
        if link is None:
            return
        stream.link = link
        try:
            await within(link.call(Submit(requests=(stream.resumed,))), CALL_TIMEOUT_S)
            if stream.cancelled:
                link.send(CancelRequests(request_ids=(stream.request.request_id,)))
        except (ConnectionError, TimeoutError) as error:
            logger.info("the engine did not take a request: %s", type(error).__name__)
            stream.link = None
            self._background.start(self._submit_later(stream))

    async def _submit_later(self, stream: RequestStream) -> None:
        """Submit again to the same engine. A new engine gets all requests in `_follow`."""
        await asyncio.sleep(RETRY_S)
        if stream.link is not None or self._streams.get(stream.request.request_id) is not stream:
            return
        await self._resubmit(self._link, stream)

    async def _resubmit(self, link: Link | None, stream: RequestStream) -> None:
        try:
            await self._submit(link, stream)
        except RequestError as error:
            stream.fail(str(error))

    async def _follow_engines(self) -> None:
        lost: Remote[Engine] | None = None
        while True:
            engine = await self._find_engine()
            try:
                await self._follow(engine)
            except (RayActorError, NotReadyError, OSError) as error:
                # the coordinator may return the old engine for a while
                level = logging.DEBUG if engine == lost else logging.WARNING
                logger.log(level, "the engine is lost (%s); asking for another", type(error).__name__)
                lost = engine
            except (RayError, EmoeError):
                logger.exception("following the engine failed")
            self._engine = self._link = None
            await asyncio.sleep(RETRY_S)

    async def _follow(self, engine: Remote[Engine]) -> None:
        """Submit all requests that `engine` does not have, and watch the engine. Ends by raising, when it is lost."""
        hello = Hello(client_id=self._client_id)
        ended = asyncio.Event()
        link = await connect(await _result(ask(engine, Engine.endpoint)), self._received, lambda _: ended.set())
        try:
            await within(link.call(hello), CALL_TIMEOUT_S)
            self._has_served = True
            # set before the loop: a stream that begins later is submitted by its own generate()
            self._engine, self._link, self._linked_at = engine, link, time.monotonic()
            for stream in [s for s in self._streams.values() if s.link is not link]:
                had_engine = stream.link is not None or bool(stream.received)
                await self._resubmit(link, stream)
                resumed = had_engine and stream.link is link
                self._resumed += resumed
                stream.resubmissions += resumed
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LIFE_S):
                        await ended.wait()
                # raises where it has ended
                await within(link.call(hello), LIFE_S)
        finally:
            link.close()

    def _received(self, link: Link, message: Message) -> None:
        assert isinstance(message, Outputs), message
        unknown: list[RequestId] = []
        for output in chain(message.tokens, message.outputs):
            stream = self._streams.get(output.request_id)
            if stream is None:
                if output.finish_reason is None:
                    unknown.append(output.request_id)
            elif stream.link is link and not stream.take(output):
                logger.warning(
                    "tokens of request %s were lost; it is run again from there", output.request_id,
                    extra={"request_id": output.request_id},
                )  # fmt: skip
                unknown.append(output.request_id)
                stream.link = None
                self._background.start(self._submit_later(stream))
        self._messages += 1
        if self._messages % UNREAD_EVERY == 0:
            self._bound_unread()
        if unknown:
            # requests that lost tokens, and requests whose clients hung up while they were being submitted
            link.send(AbortRequests(request_ids=tuple(unknown)))

    def _bound_unread(self) -> None:
        """End the requests of the slowest readers until `MAX_UNREAD` is kept."""
        unread = sum(stream.unread for stream in self._streams.values())
        while unread > MAX_UNREAD:
            slowest = max(self._streams.values(), key=lambda stream: stream.unread)
            unread -= slowest.unread
            name = slowest.request.request_id
            logger.warning("request %s is ended: its client reads too slowly", name, extra={"request_id": name})
            slowest.refuse(GenerationFailed("the client reads more slowly than tokens are made, and many are unread"))
            if slowest.link is not None:
                slowest.link.send(AbortRequests(request_ids=(slowest.request.request_id,)))

    async def _find_engine(self) -> Remote[Engine]:
        while True:
            try:
                engine = await self._answer(ask(self._coordinator, Coordinator.engine))
            except NotReadyError:
                engine = None
            if engine is not None:
                return engine
            await asyncio.sleep(RETRY_S)

    # --- Questions ----------------------------------------------------------------------------------------------

    @property
    def _lost(self) -> str | None:
        return None if self._gcs is None else self._gcs.lost

    async def readiness(self) -> Readiness:
        return self._readiness if self._lost is None else Readiness(ready=False, reason=self._lost)

    @property
    def can_wait(self) -> bool:
        waited_s = time.monotonic() - self._served_at
        if self._lost is not None or self._readiness.error is not None:
            return False
        return self._has_served and waited_s < self._recovery_timeout_s

    async def engine_status(self) -> EngineStatus:
        if self._engine is None:
            raise NotReadyError("there is no engine at the moment")
        try:
            return await _result(ask(self._engine, Engine.status))
        except (RayActorError, TimeoutError):
            raise NotReadyError("the engine does not answer") from None

    async def model_info(self) -> ModelInfo:
        return await self._answer(ask(self._coordinator, Coordinator.model_info))

    async def config(self) -> ConfigView:
        return await self._answer(ask(self._coordinator, Coordinator.config))

    async def placement(self) -> PlacementView:
        return await self._answer(ask(self._coordinator, Coordinator.placement))

    async def routing(self) -> RoutingView:
        return await self._answer(ask(self._coordinator, Coordinator.routing))

    async def workers(self) -> list[WorkerView]:
        return await self._answer(ask(self._coordinator, Coordinator.workers))

    async def cluster(self, known: Revision) -> ClusterView:
        return await self._answer(ask(self._coordinator, Coordinator.cluster, known))

    async def rebalance(self, planner: str, dry_run: bool) -> Operation | RebalancePreview:
        return await self._answer(
            ask(self._coordinator, Coordinator.rebalance, planner, dry_run), self._dry_run_timeout_s
        )

    async def scale(
        self, workers: int | None, retire: tuple[WorkerId, ...], operation_id: str | None, replace: bool
    ) -> Operation:
        # the id lets a call be repeated if the coordinator dies during it
        name = operation_id or f"scale-{uuid.uuid4().hex[:8]}"
        return await self._answer(ask(self._coordinator, Coordinator.scale, workers, retire, name, replace))

    async def scaling(self) -> ScaleView:
        return await self._answer(ask(self._coordinator, Coordinator.scaling))

    async def place(self, placement: Placement, pinned: bool | None) -> Operation:
        return await self._answer(ask(self._coordinator, Coordinator.place, placement, pinned))

    async def unpin(self) -> None:
        await self._answer(ask(self._coordinator, Coordinator.unpin))

    async def operations(self) -> list[Operation]:
        return await self._answer(ask(self._coordinator, Coordinator.operations))

    async def operation(self, operation_id: str) -> Operation | None:
        return await self._answer(ask(self._coordinator, Coordinator.operation, operation_id))

    async def counters(self) -> ClusterCounters:
        return await self._answer(ask(self._coordinator, Coordinator.counters))

    @property
    def resumed_requests(self) -> int:
        return self._resumed

    async def _watch_readiness(self) -> None:
        answered = False
        self._served_at = time.monotonic()
        while True:
            try:
                self._readiness = await _result(ask(self._coordinator, Coordinator.readiness), HANG_S)
                answered = True
            except (RayActorError, TimeoutError) as error:
                if answered and isinstance(error, TimeoutError):
                    # Ray restarts it, and it continues from its saved state; the start may take its time
                    logger.warning("the coordinator hangs; it is ended")
                    kill(self._coordinator, restart=True)
                    answered = False
                # requests need the engine alone
                if self._engine is None:
                    self._readiness = Readiness(ready=False, reason="the coordinator does not answer")
            except (RayError, EmoeError) as error:
                logger.exception("asking for readiness failed")
                self._readiness = Readiness(ready=False, reason=f"the coordinator failed: {type(error).__name__}")
            self._give_up_in_vain(time.monotonic())
            await asyncio.sleep(READINESS_S * (4 if self._readiness.ready else 1))

    def _give_up_in_vain(self, now: float) -> None:
        """End every request with an error, if the cluster has not served for `recovery_timeout_s`.

        Without this a client would wait for ever, and learn nothing.
        """
        if self._readiness.ready:
            self._served_at = now
            self._has_served = True
        if now - self._served_at < self._recovery_timeout_s:
            return
        waited = f"{self._recovery_timeout_s:g} s"
        self._end_all(f"the cluster could not serve this request for {waited}: {self._readiness.reason}")

    async def _watch_gcs(self, gcs: GcsWatch) -> None:
        told = False
        while True:
            await gcs.look(time.monotonic())
            if gcs.lost is not None and not told:
                logger.error("requests are ended: %s", gcs.lost)
            told = gcs.lost is not None
            if gcs.lost is not None:
                self._end_all(gcs.lost)
            await asyncio.sleep(LOOK_S)

    def _end_all(self, message: str) -> None:
        """End every request with an error."""
        for stream in self._streams.values():
            if stream.received:
                stream.fail(message)
            else:
                # nothing was sent yet, so the client can get a status that says: try again later
                stream.refuse(NotReadyError(message))
            if stream.link is not None:
                stream.link.send(AbortRequests(request_ids=(stream.request.request_id,)))

    async def _answer(self, answer: Awaitable[R], timeout_s: float = CALL_TIMEOUT_S) -> R:
        """The coordinator's answer. Raises what the coordinator raises, and NotReadyError while it does not answer."""
        try:
            return await _result(answer, timeout_s)
        except (RayActorError, TimeoutError):
            raise NotReadyError("the coordinator does not answer") from None


def _has_failed(error: BaseException) -> None:
    logger.error("a task of the API has failed", exc_info=error)


async def _result(answer: Awaitable[R], timeout_s: float = CALL_TIMEOUT_S) -> R:
    """The result of a Ray call. Raises the callee's own exception where it is one of ours, and TimeoutError."""
    try:
        return await within(answer, timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, EmoeError):
            raise error.cause from None
        raise
