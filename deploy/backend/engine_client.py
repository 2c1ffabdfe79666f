"""The API's requests at the engine: they travel over one connection, and go on with the next engine if one is lost.

    generate() -> Submit to the engine          Outputs from the engine -> the requests' queues -> generate()

The tokens that each request has got are kept here. When the engine is lost, every unfinished request is submitted to
the next engine together with its tokens, and `offset` says which tokens of the new engine are repeats. Meanwhile the
request's stream pauses.

A lasting request outlives this process too: the engine keeps its tokens, and another replica may `generate` it again.

Where there are several groups, each has a client of its own, and groups.py moves requests from one to another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ray.exceptions import RayActorError, RayError

from elastic_moe.actors.engine.engine import Engine
from elastic_moe.actors.liveness import ADOPT_S, CALL_TIMEOUT_S, LIFE_S
from elastic_moe.actors.remote.ask import Remote, ask
from elastic_moe.actors.remote.background import Background
from elastic_moe.actors.remote.calls import within
from elastic_moe.actors.remote.codec import Message
from elastic_moe.actors.remote.links import Link, connect
from elastic_moe.cluster.errors import EmoeError, NotReadyError, RequestError
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
from elastic_moe.cluster.messages.views import EngineStatus
from elastic_moe.deploy.backend.backend import GenerationFailed
from elastic_moe.deploy.backend.ray_calls import result
from elastic_moe.deploy.backend.request_stream import RequestStream, TakesTokens

logger = logging.getLogger(__name__)

MAX_UNREAD = 2**21
"""Most tokens and log probabilities of all requests that clients have not read yet: some 200 MB."""
MOST_NUMBERS = 2**31 - 1
"""The numbers of requests begin again after this one."""
UNREAD_EVERY = 64
"""Number of messages from the engine between two checks of `MAX_UNREAD`."""
AT_ONCE = 256
"""Outputs that are taken in one turn of the loop, some 3 ms. A message may have those of thousands of requests."""
RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """What is left of a message."""

    link: Link
    tokens: Iterator[tuple[int, int, int]]
    """Numbers, offsets and tokens. They come before the outputs."""
    outputs: Iterator[TokenOutput]


class EngineClient:
    """Made and used on one event loop. `follow` runs as long as there are requests."""

    def __init__(
        self,
        find: Callable[[], Awaitable[Remote[Engine] | None]],
        background: Background,
        *,
        group: int = 0,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        """`find` asks for the engine; None: there is none now. `background` runs what outlasts a call. `group`: number
        of the engine's group. `lost` is called when a connection to an engine has ended."""
        self._find = find
        self._group = group
        self._lost = lost
        self._background = background
        self._client_id = uuid.uuid4().hex
        self._streams: dict[RequestId, RequestStream] = {}
        self._numbered: dict[int, RequestStream] = {}
        """The same streams by the numbers that the engine knows."""
        self._next_number = 1
        self.current: Remote[Engine] | None = None
        """The engine that is connected; None while none is."""
        self.has_connected = False
        """Whether an engine has ever been connected."""
        self.resumed = 0
        """Number of requests that went on with another engine."""
        self._link: Link | None = None
        self._linked_at = 0.0
        self._messages = 0
        self._unfinished: deque[_Unfinished] = deque()
        """The messages whose outputs have not all been taken, the oldest first."""

    # --- Requests -----------------------------------------------------------------------------------------------

    async def generate(
        self, request: GenerateRequest, shortcut: TakesTokens | None = None
    ) -> AsyncGenerator[TokenOutput, None]:
        stream = RequestStream(request, shortcut)
        self.take(stream)
        ended = False
        try:
            await self.submit(stream)
            while not ended:
                output = await stream.next()
                ended = output.finish_reason is not None
                yield output
        finally:
            self.give_up(stream, ended=ended)

    def take(self, stream: RequestStream) -> None:
        """From now on the request is this client's, and goes to its engine as soon as there is one."""
        self._streams[stream.request.request_id] = stream
        stream.group, stream.number = self._group, self._next_number
        self._numbered[stream.number] = stream
        # 32-bit integers; by then the first ones have ended
        self._next_number = self._next_number % MOST_NUMBERS + 1

    async def submit(self, stream: RequestStream) -> None:
        """Send a request that was taken to the engine, if there is one. Raises RequestError if it refuses it."""
        await self._submit(self._link, stream)

    def give_up(self, stream: RequestStream, *, ended: bool) -> None:
        """The request is no longer this client's. The engine aborts it unless it has ended, or is lasting."""
        del self._streams[stream.request.request_id]
        self._numbered.pop(stream.number, None)
        if not ended and stream.link is not None:
            stream.link.send(AbortRequests(request_ids=(stream.request.request_id,)))

    def take_over(self, stream: RequestStream) -> None:
        """Take a request that another client has given up, and go on with it."""
        had_engine, stream.link = stream.link is not None or bool(stream.received), None
        self.take(stream)
        self._background.start(self._resume(self._link, stream, had_engine))

    @property
    def streams(self) -> list[RequestStream]:
        """The requests of this client."""
        return list(self._streams.values())

    def group_of(self, request_id: RequestId) -> int:
        return self._group

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._streams

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

    async def status(self) -> EngineStatus:
        if self.current is None:
            raise NotReadyError("there is no engine at the moment")
        try:
            return await result(ask(self.current, Engine.status))
        except (RayActorError, TimeoutError):
            raise NotReadyError("the engine does not answer") from None

    async def _submit(self, link: Link | None, stream: RequestStream) -> None:
        """Raises RequestError if the engine refuses it. The next engine gets it if this one is gone."""
        if link is None:
            return
        stream.link = link
        try:
            await within(link.call(Submit(requests=(stream.resumed,), numbers=(stream.number,))), CALL_TIMEOUT_S)
            if stream.cancelled:
                link.send(CancelRequests(request_ids=(stream.request.request_id,)))
        except (ConnectionError, TimeoutError) as error:
            logger.info("the engine did not take a request: %s", type(error).__name__)
            if stream.link is link:
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

    async def _resume(self, link: Link | None, stream: RequestStream, had_engine: bool) -> None:
        """Submit a request to another engine. `had_engine`: whether it was at an engine before."""
        await self._resubmit(link, stream)
        resumed = had_engine and link is not None and stream.link is link
        self.resumed += resumed
        stream.resubmissions += resumed

    def end_all(self, message: str) -> None:
        """End every request with an error."""
        for stream in self._streams.values():
            if stream.received:
                stream.fail(message)
            else:
                # nothing was sent yet, so the client can get a status that says: try again later
                stream.refuse(NotReadyError(message))
            if stream.link is not None:
                stream.link.send(AbortRequests(request_ids=(stream.request.request_id,)))

    # --- The engine ---------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        lost: Remote[Engine] | None = None
        while True:
            engine = await self._next_engine()
            try:
                await self._follow(engine)
            except NotReadyError:
                logger.debug("the engine has not begun to serve; asking for it again")
            except (RayActorError, OSError) as error:
                if engine == lost:
                    level = logging.DEBUG  # the coordinator may return the old engine for a while
                else:
                    # nobody waits for it where the server ends
                    level = logging.WARNING if self._streams else logging.INFO
                logger.log(level, "the engine is lost (%s); asking for another", type(error).__name__)
                lost = engine
            except (RayError, EmoeError):
                logger.exception("following the engine failed")
            self.current = self._link = None
            self._lost()
            await asyncio.sleep(RETRY_S)

    async def _follow(self, engine: Remote[Engine]) -> None:
        """Submit all requests that `engine` does not have, and watch the engine. Ends by raising, when it is lost."""
        hello = Hello(client_id=self._client_id)
        ended = asyncio.Event()
        link = await connect(await result(ask(engine, Engine.endpoint)), self._received, lambda _: ended.set())
        try:
            await within(link.call(hello), CALL_TIMEOUT_S)
            self.has_connected = True
            # set before the loop: a stream that begins later is submitted by its own generate()
            self.current, self._link, self._linked_at = engine, link, time.monotonic()
            for stream in [s for s in self._streams.values() if s.link is not link]:
                if self._streams.get(stream.request.request_id) is not stream:
                    continue
                await self._resume(link, stream, stream.link is not None or bool(stream.received))
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
        self._unfinished.append(_Unfinished(link, message.tokens.rows(), iter(message.outputs)))
        if len(self._unfinished) == 1:
            self._take_some()

    def _take_some(self) -> None:
        """Take up to `AT_ONCE` outputs of the oldest message. The others get turns of their own."""
        oldest = self._unfinished[0]
        taken = 0
        try:
            taken = self._take_part(oldest)
        except ValueError as error:
            logger.warning("the engine's connection is closed: %s", error)
            oldest.link.close()
        finally:
            # also where it has failed: what comes later must not wait for it
            if taken < AT_ONCE:
                self._unfinished.popleft()
                self._messages += 1
            if self._unfinished:
                asyncio.get_running_loop().call_soon(self._take_some)
        if taken < AT_ONCE and self._messages % UNREAD_EVERY == 0:
            self._bound_unread()

    def _take_part(self, message: _Unfinished) -> int:
        """Take up to `AT_ONCE` outputs. Returns their number. Raises ValueError if columns do not match."""
        unknown: list[RequestId] = []
        without: list[int] = []
        link = message.link
        taken = self._take_tokens(link, islice(message.tokens, AT_ONCE), unknown, without)
        for output in islice(message.outputs, AT_ONCE - taken):
            taken += 1
            self._take(link, self._streams.get(output.request_id), output, unknown)
        if unknown or without:
            # requests that lost tokens, and requests whose clients hung up while they were being submitted
            link.send(AbortRequests(request_ids=tuple(unknown), numbers=tuple(without)))
        return taken

    def _take_tokens(
        self, link: Link, rows: Iterable[tuple[int, int, int]], unknown: list[RequestId], without: list[int]
    ) -> int:
        """Give tokens to their streams. Returns their number. `without` gets the numbers that no stream has."""
        numbered, taken = self._numbered, 0
        for number, offset, token_id in rows:
            taken += 1
            stream = numbered.get(number)
            if stream is None:
                without.append(number)
            elif stream.link is not link or not stream.take_token(offset, token_id):
                name = stream.request.request_id
                output = TokenOutput(request_id=name, offset=offset, token_ids=(token_id,))
                self._take(link, stream, output, unknown)
        return taken

    def _take(self, link: Link, stream: RequestStream | None, output: TokenOutput, unknown: list[RequestId]) -> None:
        """Give an output to its stream. `unknown` gets its name where the engine is to abort the request."""
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

    async def _next_engine(self) -> Remote[Engine]:
        while (engine := await self._find()) is None:
            await asyncio.sleep(RETRY_S)
        return engine
