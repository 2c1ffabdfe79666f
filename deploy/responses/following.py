"""Background responses that this replica follows: their tokens so far, until their records are finished.

    accept() or adopt -> _run(): tokens from the engine -> Followed -> readers, each with a rendering of its own
                                                        -> the end: the record, with its outcome, goes to the store

A replica follows what it has accepted, what its clients read, and what no living replica follows any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from ray.exceptions import RayError

from elastic_moe.actors.liveness import ADOPT_S
from elastic_moe.actors.remote.background import Background
from elastic_moe.cluster.errors import EmoeError, NotReadyError, RequestError
from elastic_moe.cluster.messages.requests import FinishReason, RequestId, TokenOutput
from elastic_moe.deploy.backend.backend import GenerationFailed, Requests
from elastic_moe.deploy.generation.metrics import Metrics
from elastic_moe.deploy.responses.counting import Counting
from elastic_moe.deploy.responses.events import Event
from elastic_moe.deploy.responses.record import Ending, Outcome, Record
from elastic_moe.deploy.responses.rendering import Rendering, outputs_of, tokens_of
from elastic_moe.deploy.responses.store import Store

logger = logging.getLogger(__name__)

AT_ONCE = 64
"""Tokens that are rendered before other requests get their turn."""
RETRY_S = 0.5
CANCEL_S = 0.05
"""Seconds until a cancellation is asked for again."""

OpenRendering = Callable[[Record], Coroutine[Any, Any, Rendering]]
"""It makes a fresh rendering of a record."""
Began = Callable[[], None]
Lives = Callable[[str], Coroutine[Any, Any, bool]]


class Followed:
    """One response that this replica follows."""

    def __init__(self, record: Record) -> None:
        self.record = record
        """The response's record, which has the outcome once there is one."""
        self.tokens: list[int] = []
        self.cached_tokens = 0
        self.ending: Ending | None = None
        self.stored = asyncio.Event()
        self._more: list[asyncio.Future[None]] = []

    def add(self, token_ids: Sequence[int], ending: Ending | None) -> None:
        self.tokens += token_ids
        self.ending = ending
        waiting, self._more = self._more, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def more(self) -> None:
        """Wait until there are more tokens, or the end."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._more.append(future)
        await future

    def since(self, offset: int) -> TokenOutput:
        """The tokens from `offset` on as one output, with the end if it has come."""
        ended = self.ending
        return TokenOutput(
            request_id=self.record.request.request_id,
            offset=offset,
            token_ids=tuple(self.tokens[offset:]),
            cached_tokens=self.cached_tokens,
            finish_reason=None if ended is None else ended.reason,
            error=None if ended is None else ended.error,
        )


class Following:
    """All that one replica follows, on one event loop."""

    def __init__(
        self,
        engine: Requests,
        store: Store,
        metrics: Metrics,
        open_rendering: OpenRendering,
        generation: str = "",
        lives: Lives | None = None,
    ) -> None:
        """generation: the cluster of the engine. lives: tells whether another cluster still finishes its own
        responses; without it, there is no other."""
        self._generation = generation
        self._lives = lives
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._open = open_rendering
        self._followed: dict[str, Followed] = {}
        self._background = Background(_has_failed)

    def __len__(self) -> int:
        return len(self._followed)

    async def accept(self, record: Record, began: Began) -> Followed:
        """Store a new response and follow it: from now on, it is answered.

        `began` is called again and again from its first token on, and with its end. Raises NotReadyError where the
        response cannot be stored.
        """
        try:
            await self._store.begin(record)
        except RayError:
            raise NotReadyError("the response cannot be stored at the moment") from None
        return self.follow(record, began, Counting(self._metrics, record.request))

    def check_ours(self, record: Record) -> None:
        """Raises RequestError 409 for a response of another model, whose tokens this replica cannot read."""
        if record.generation != self._generation:
            raise RequestError(
                f"response {record.id} is of a model that has been replaced: it can be read as a whole once it has"
                " ended, and neither streamed nor cancelled",
                param="response_id",
                code="model_replaced",
                status=409,
            )

    def follow(self, record: Record, began: Began = lambda: None, counting: Counting | None = None) -> Followed:
        """Follow a response in progress, unless this replica does so already."""
        followed = self._followed.get(record.id)
        if followed is None:
            followed = self._followed[record.id] = Followed(record)
            self._background.start(self._run(followed, began, counting))
        return followed

    async def events(self, record: Record, after: int) -> AsyncGenerator[Event, None]:
        """The events whose sequence numbers are above `after`, to the last one of the response."""
        followed = None if record.outcome is not None else self.follow(record)
        rendering = await self._open(record)
        for event in rendering.begin():
            if event["sequence_number"] > after:
                yield event
        outputs = _stored(record) if followed is None else _following(followed)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                for event in rendering.feed(output):
                    if event["sequence_number"] > after:
                        yield event

    async def cancel(self, record: Record) -> Record:
        """End a response in progress. Returns its record with the outcome, which may be that it had ended before."""
        followed = self.follow(record)
        while not followed.stored.is_set():
            with contextlib.suppress(KeyError):  # it is about to begin, or is being stored
                self._engine.cancel(record.request.request_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CANCEL_S):
                    await followed.stored.wait()
        return followed.record

    async def watch(self) -> None:
        """Follow what no living replica follows. Never returns."""
        while True:
            await asyncio.sleep(ADOPT_S)
            try:
                await self._adopt()
            except (RayError, EmoeError) as error:
                logger.info("looking for responses that nobody follows failed: %s", type(error).__name__)

    async def _adopt(self) -> None:
        names = [name for name in await self._store.unfinished() if name not in self._followed]
        records = [record for name in names if (record := await self._store.find(name)) and record.outcome is None]
        if not records:
            return
        await self._end_those_of_the_dead([record for record in records if record.generation != self._generation])
        records = [record for record in records if record.generation == self._generation]
        orphans = set(await self._engine.orphans([record.request.request_id for record in records]))
        for record in records:
            if record.request.request_id not in orphans:
                continue
            # it may have ended, and been stored, since it was read
            now = await self._store.find(record.id)
            if now is not None and now.outcome is None:
                logger.warning(
                    "response %s is followed from here, because no replica does so", record.id,
                    extra={"request_id": record.request.request_id},
                )  # fmt: skip
                self.follow(now, counting=Counting(self._metrics, now.request, adopted=True))

    async def _end_those_of_the_dead(self, records: Sequence[Record]) -> None:
        """Responses of clusters that have ended before they could finish them have failed."""
        for record in records:
            if self._lives is None or not await self._lives(record.generation):
                self.follow(record)

    def close(self) -> None:
        self._background.cancel()

    # --- One response -------------------------------------------------------------------------------------------

    async def _run(self, followed: Followed, began: Began, counting: Counting | None) -> None:
        """`counting` is None where another replica has accepted the response: then it is counted there."""
        record = followed.record
        try:
            rendering = await self._opened(record)
        except Exception:
            # a defect: whoever looks next may try again
            del self._followed[record.id]
            followed.stored.set()
            began()
            raise
        rendering.begin()
        error = "the engine ended this request without an answer"
        try:
            await self._generate(followed, rendering, began, counting)
        except (RequestError, GenerationFailed, NotReadyError) as failure:
            error = str(failure)
        except Exception:
            logger.exception("response %s has failed", record.id)
            error = "internal error; the server's log says more"
        finally:
            began()
        if rendering.ending is None:
            rendering.feed(failed(record.request.request_id, error))
            followed.add((), rendering.ending)
        ending = rendering.ending
        assert ending is not None
        if counting is not None:
            counting.ended(ending.reason)
        outcome = Outcome(
            token_ids=tuple(followed.tokens),
            ending=ending,
            cached_tokens=followed.cached_tokens,
            ended_at_s=time.time(),
            response=rendering.response(),
        )
        followed.record = dataclasses.replace(record, outcome=outcome)
        await self._finish(followed)

    async def _opened(self, record: Record) -> Rendering:
        while True:
            try:
                return await self._open(record)
            except NotReadyError:  # a replica that has just started has no tokenizer yet
                await asyncio.sleep(RETRY_S)

    async def _generate(
        self, followed: Followed, rendering: Rendering, began: Began, counting: Counting | None
    ) -> None:
        """Take all tokens from the engine."""
        if followed.record.generation != self._generation:
            raise NotReadyError("the model that this response was asked of has been replaced")
        request = followed.record.request
        outputs = self._engine.generate(request)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                began()
                followed.cached_tokens = followed.cached_tokens or output.cached_tokens
                for number, one in enumerate(tokens_of(output)):
                    if number % AT_ONCE == AT_ONCE - 1:
                        await asyncio.sleep(0)
                    rendering.feed(one)
                    # the end comes with the last token, so that readers render the same as this one
                    followed.add(one.token_ids, rendering.ending)
                    if rendering.ending is not None:
                        break
                if counting is not None:
                    counting.came(output, len(followed.tokens), self._engine.group_of(request.request_id))
                if rendering.ending is not None:
                    if output.finish_reason is None:  # a stop string was found
                        self._engine.cancel(request.request_id)
                    return

    async def _finish(self, followed: Followed) -> None:
        """Store the outcome, however long that takes: the response was accepted."""
        while True:
            try:
                await self._store.finish(followed.record)
                break
            except RayError:
                logger.warning("response %s cannot be stored at the moment", followed.record.id)
                await asyncio.sleep(RETRY_S)
        self._engine.forget(followed.record.request.request_id)
        del self._followed[followed.record.id]
        followed.stored.set()


def _has_failed(error: BaseException) -> None:
    logger.error("following a response has failed", exc_info=error)


def failed(request_id: RequestId, error: str) -> TokenOutput:
    """The last output of a request that has failed outside the engine."""
    return TokenOutput(request_id=request_id, offset=0, token_ids=(), finish_reason=FinishReason.ERROR, error=error)


async def _stored(record: Record) -> AsyncGenerator[TokenOutput, None]:
    for number, output in enumerate(outputs_of(record)):
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)
        yield output


async def _following(followed: Followed) -> AsyncGenerator[TokenOutput, None]:
    """All outputs of a response that this replica follows, from the first one to the end."""
    given = 0
    while True:
        output = followed.since(given)
        output = dataclasses.replace(output, token_ids=output.token_ids[:AT_ONCE])
        given += len(output.token_ids)
        if given < len(followed.tokens):
            # the end belongs to the last tokens
            yield dataclasses.replace(output, finish_reason=None, error=None)
            await asyncio.sleep(0)
            continue
        if output.token_ids or output.finish_reason is not None:
            yield output
        if output.finish_reason is not None:
            return
        if given == len(followed.tokens) and followed.ending is None:
            await followed.more()
