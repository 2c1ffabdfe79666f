"""The real Backend: the coordinator and the engine as Ray actors.

Guarantee: a request that the engine has accepted ends with its full answer, unless this process dies. Kept here: the
tokens that each request has got; when the engine is lost, every unfinished request is submitted to its successor
together with them, and `offset` tells which tokens of the new engine are repeats. Meanwhile its stream just pauses.

    generate() -> submit() of the engine          one poll loop: poll() -> the requests' queues -> generate()
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import uuid
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.counters import ClusterCounters
from cluster.errors import EmoeError, NotReadyError, RequestError
from cluster.placement import Placement, WorkerId
from cluster.protocol import (
    EngineStatus,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    Operation,
    PlacementView,
    Readiness,
    RebalancePreview,
    RequestId,
    RoutingView,
    TokenOutput,
    WorkerView,
)

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0
PLAN_MARGIN_S = 60.0
"""A dry run answers after `plan_deadline` plus at most this."""
POLL_TIMEOUT_S = 25.0
"""A poll returns after some 10 s; one that has not by then is of an engine that hangs."""
HANG_S = 10.0
"""A coordinator that gives no sign of life for so long, and did before, hangs."""
RETRY_S = 0.1
READINESS_S = 0.25


class _Stream:
    """A request under way: its tokens so far, and its way to whoever reads it."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.received: list[int] = list(request.output_token_ids)
        self.outputs: asyncio.Queue[TokenOutput] = asyncio.Queue()
        self.engine: Any = None
        """The engine that has accepted it; None while there is none."""

    @property
    def resumed(self) -> GenerateRequest:
        return dataclasses.replace(self.request, output_token_ids=tuple(self.received))

    def take(self, output: TokenOutput) -> bool:
        """Hand on what is new of `output`. False where tokens before it are missing: they were lost on the way."""
        repeats = len(self.received) - output.offset
        if repeats < 0:
            return False
        if repeats:
            output = dataclasses.replace(
                output,
                offset=len(self.received),
                token_ids=output.token_ids[repeats:],
                logprobs=output.logprobs[repeats:],
            )
        self.received += output.token_ids
        if output.token_ids or output.finish_reason is not None:
            self.outputs.put_nowait(output)
        return True


class RayBackend:
    """Made and used on one event loop. `begin` starts its two tasks; `end` stops them."""

    def __init__(self, coordinator: Any, *, plan_deadline_s: float) -> None:
        self._coordinator = coordinator
        self._plan_timeout_s = plan_deadline_s + PLAN_MARGIN_S
        self._client_id = uuid.uuid4().hex
        self._streams: dict[RequestId, _Stream] = {}
        self._engine: Any = None
        self._readiness = Readiness(ready=False, reason="starting")
        self._resumed = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        for work in (self._watch_readiness(), self._poll_forever()):
            self._start(work)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- Requests -----------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        stream = _Stream(request)
        self._streams[request.request_id] = stream
        ended = False
        try:
            await self._submit(self._engine, [stream])
            while not ended:
                output = await stream.outputs.get()
                ended = output.finish_reason is not None
                yield output
        finally:
            del self._streams[request.request_id]
            if not ended and stream.engine is not None:
                self._start(self._abort(stream.engine, [request.request_id]))

    async def _submit(self, engine: Any, streams: list[_Stream]) -> None:
        """Raises RequestError where the engine refuses. Where it is gone, the poll loop will submit them again."""
        if engine is None:
            return
        for stream in streams:
            stream.engine = engine
        try:
            await _result(engine.submit.remote(self._client_id, [stream.resumed for stream in streams]))
        except (RayActorError, NotReadyError, TimeoutError) as error:
            logger.info("the engine did not take %d requests: %s", len(streams), type(error).__name__)
            for stream in streams:
                stream.engine = None
                self._start(self._submit_later(stream))

    async def _submit_later(self, stream: _Stream) -> None:
        """The poll loop submits what it finds when it meets a new engine; this is for an engine that it knows."""
        await asyncio.sleep(RETRY_S)
        if stream.engine is not None or self._streams.get(stream.request.request_id) is not stream:
            return
        try:
            await self._submit(self._engine, [stream])
        except RequestError as error:
            stream.outputs.put_nowait(_failure(stream, str(error)))

    async def _abort(self, engine: Any, request_ids: list[RequestId]) -> None:
        # A dead engine runs nothing.
        with contextlib.suppress(RayError, EmoeError, TimeoutError):
            await _result(engine.abort.remote(self._client_id, request_ids))

    async def _poll_forever(self) -> None:
        lost: Any = None
        while True:
            engine = await self._find_engine()
            try:
                await self._poll(engine)
            except (RayActorError, TimeoutError) as error:
                # The coordinator may name the old one for a while.
                level = logging.DEBUG if engine == lost else logging.WARNING
                logger.log(level, "the engine is lost (%s); asking for another", type(error).__name__)
                lost = engine
            except (RayError, EmoeError):
                logger.exception("polling the engine failed")
            self._engine = None
            await asyncio.sleep(RETRY_S)

    async def _poll(self, engine: Any) -> None:
        """Submit what has no engine, or had another one; then hand out what comes. Returns only by raising."""
        while True:
            # Before the look at the streams: one that begins after it is submitted by its own generate().
            self._engine = engine
            await self._resubmit(engine, [s for s in self._streams.values() if s.engine != engine])
            outputs = await _result(engine.poll.remote(self._client_id), POLL_TIMEOUT_S)
            await self._deliver(engine, outputs)

    async def _resubmit(self, engine: Any, streams: list[_Stream]) -> None:
        """One by one, so that one refused does not take the others along."""
        for stream in streams:
            had_engine = stream.engine is not None or bool(stream.received)
            try:
                await self._submit(engine, [stream])
            except RequestError as error:
                stream.outputs.put_nowait(_failure(stream, str(error)))
                continue
            if stream.engine is None:
                raise TimeoutError("the engine takes no requests")
            self._resumed += had_engine

    async def _deliver(self, engine: Any, outputs: Iterable[TokenOutput]) -> None:
        unknown: list[RequestId] = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                if output.finish_reason is None:
                    unknown.append(output.request_id)
            elif not stream.take(output):
                logger.warning("tokens of request %s were lost; it is run again from there", output.request_id)
                await self._abort(engine, [output.request_id])
                stream.engine = None
        if unknown:
            # Their clients hung up while they were being submitted.
            self._start(self._abort(engine, unknown))

    async def _find_engine(self) -> Any:
        while True:
            try:
                engine = await self._ask("engine")
            except NotReadyError:
                engine = None
            if engine is not None:
                return engine
            await asyncio.sleep(RETRY_S)

    # --- Questions ----------------------------------------------------------------------------------------------

    async def readiness(self) -> Readiness:
        return self._readiness

    async def engine_status(self) -> EngineStatus:
        if self._engine is None:
            raise NotReadyError("there is no engine at the moment")
        try:
            status: EngineStatus = await _result(self._engine.status.remote())
        except (RayActorError, TimeoutError):
            raise NotReadyError("the engine does not answer") from None
        return status

    async def model_info(self) -> ModelInfo:
        info: ModelInfo = await self._ask("model_info")
        return info

    async def placement(self) -> PlacementView:
        view: PlacementView = await self._ask("placement")
        return view

    async def routing(self) -> RoutingView:
        view: RoutingView = await self._ask("routing")
        return view

    async def workers(self) -> list[WorkerView]:
        return list(await self._ask("workers"))

    async def rebalance(self, planner: str, dry_run: bool) -> Operation | RebalancePreview:
        outcome: Operation | RebalancePreview = await self._ask(
            "rebalance", planner, dry_run, timeout_s=self._plan_timeout_s
        )
        return outcome

    async def scale(
        self, workers: int | None, retire: tuple[WorkerId, ...], operation_id: str | None, replace: bool
    ) -> Operation:
        # with an id of its own, a call that the coordinator's death cut off can be made again
        name = operation_id or f"scale-{uuid.uuid4().hex[:8]}"
        operation: Operation = await self._ask("scale", workers, retire, name, replace)
        return operation

    async def place(self, placement: Placement, pinned: bool | None) -> Operation:
        operation: Operation = await self._ask("place", placement, pinned)
        return operation

    async def unpin(self) -> None:
        await self._ask("unpin")

    async def operations(self) -> list[Operation]:
        return list(await self._ask("operations"))

    async def operation(self, operation_id: str) -> Operation | None:
        operation: Operation | None = await self._ask("operation", operation_id)
        return operation

    async def counters(self) -> ClusterCounters:
        counters: ClusterCounters = await self._ask("counters")
        return counters

    @property
    def resumed_requests(self) -> int:
        return self._resumed

    async def _watch_readiness(self) -> None:
        answered = False
        while True:
            try:
                self._readiness = await _result(self._coordinator.readiness.remote(), HANG_S)
                answered = True
            except (RayActorError, TimeoutError) as error:
                if answered and isinstance(error, TimeoutError):
                    # Ray makes it anew, and it goes on from what it has saved; a new one may take its time
                    logger.warning("the coordinator hangs; it is ended")
                    ray.kill(self._coordinator, no_restart=False)
                    answered = False
                # requests need the engine alone
                if self._engine is None:
                    self._readiness = Readiness(ready=False, reason="the coordinator does not answer")
            except (RayError, EmoeError) as error:
                logger.exception("asking for readiness failed")
                self._readiness = Readiness(ready=False, reason=f"the coordinator failed: {type(error).__name__}")
            await asyncio.sleep(READINESS_S)

    async def _ask(self, method: str, *args: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Raises NotReadyError while the coordinator is away, and what it raises itself."""
        try:
            return await _result(getattr(self._coordinator, method).remote(*args), timeout_s)
        except (RayActorError, TimeoutError):
            raise NotReadyError("the coordinator does not answer") from None

    def _start(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _result(ref: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
    """The result of a Ray call. Raises the callee's own exception where it is one of ours, and TimeoutError."""
    try:
        # wait_for() of Python 3.11 may lose a cancellation
        async with asyncio.timeout(timeout_s):
            return await ref
    except RayTaskError as error:
        if isinstance(error.cause, EmoeError):
            raise error.cause from None
        raise


def _failure(stream: _Stream, message: str) -> TokenOutput:
    return TokenOutput(
        request_id=stream.request.request_id,
        offset=len(stream.received),
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        error=message,
    )
