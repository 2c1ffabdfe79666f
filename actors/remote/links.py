"""Connections on an event loop that carry the messages of actors/remote/codec.py: questions with answers, and news."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from elastic_moe.actors.liveness import CONNECT_S, TOKEN_S
from elastic_moe.actors.remote.codec import Frames, Message, WireError, encode, keep_alive
from elastic_moe.actors.remote.handshakes import BACKLOG, Handshakes
from elastic_moe.cluster.errors import RequestError, StepAborted, WorkerError
from elastic_moe.cluster.messages.requests import Adopted, Endpoint, Refused
from elastic_moe.cluster.messages.steps import Done, Failed, StepResult

logger = logging.getLogger(__name__)

_ANSWERS = (Done, Failed, Refused, StepResult, Adopted)

Answered = Callable[[Any], None]
"""Takes the answer to a question, or the error in its place."""


class Link(asyncio.Protocol):
    """One end of a connection. Answers belong to calls, in the order of the calls; other messages go to `received`."""

    def __init__(self, received: Callable[[Link, Message], None], lost: Callable[[Link], None]) -> None:
        """`received` raises WireError for an unexpected message, which ends the connection.

        `lost` is called once, when the connection has ended for any reason.
        """
        self._received = received
        self._lost = lost
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self._asked: deque[Answered] = deque()
        self.closed = False

    def send(self, message: Message) -> None:
        """Send `message`, which is dropped if the connection has ended."""
        if self._transport is not None and not self.closed:
            self._transport.write(encode(message))

    def call(self, message: Message) -> asyncio.Future[Any]:
        """Returns a future of the answer. It raises the answer's error, or ConnectionError if the connection ends."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.closed:
            future.set_exception(ConnectionError("the connection has ended"))
            return future
        self._asked.append(partial(_resolve, future))
        self.send(message)
        return future

    def ask(self, frame: bytes, answered: Answered) -> None:
        """Send an encoded question. `answered` is called with what `call` would return or raise, without a turn of the
        loop in between: at once if the connection has ended."""
        if self._transport is None or self.closed:
            answered(ConnectionError("the connection has ended"))
            return
        self._asked.append(answered)
        self._transport.write(frame)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- Called by the loop -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._frames.feed(data):
                if isinstance(message, _ANSWERS):
                    self._answered(message)
                else:
                    self._received(self, message)
        except WireError as error:
            logger.warning("a connection is closed: %s", error)
            self.close()

    def _answered(self, message: Message) -> None:
        if not self._asked:
            raise WireError("an answer came to no question")
        self._asked.popleft()(_error(message) or message)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        asked, self._asked = self._asked, deque()
        for answered in asked:
            answered(ConnectionError("the connection has ended"))
        self._lost(self)


class _ServerLink(Link):
    """The accepting end. It sends nothing and decodes nothing before it has seen the token."""

    def __init__(
        self,
        handshakes: Handshakes[_ServerLink],
        received: Callable[[Link, Message], None],
        lost: Callable[[Link], None],
    ) -> None:
        """`handshakes` is shared by all connections of one listener."""
        super().__init__(received, lost)
        self._handshakes = handshakes
        self._admitted = False
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        oldest = self._handshakes.begin(self, loop.time())
        if oldest is not None:
            oldest.close()
        self._limit = loop.call_later(TOKEN_S, self.close)

    def data_received(self, data: bytes) -> None:
        if not self._admitted:
            try:
                rest = self._handshakes.show(self, data)
            except WireError:
                self.close()
                return
            if rest is None:
                return
            self._admitted, data = True, rest
            self._no_limit()
        super().data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._no_limit()
        self._handshakes.end(self)
        super().connection_lost(error)

    def _no_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()


def _resolve(future: asyncio.Future[Any], answer: Any) -> None:
    # the caller may have stopped waiting
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _error(message: Message) -> Exception | None:
    if isinstance(message, Failed):
        return StepAborted(message.reason) if message.aborted else WorkerError(message.reason)
    if isinstance(message, Refused):
        return RequestError(message.message, param=message.param, code=message.code, status=message.status)
    return None


async def connect(endpoint: Endpoint, received: Callable[[Link, Message], None], lost: Callable[[Link], None]) -> Link:
    """Connect and show the token. Raises OSError; TimeoutError is one."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_S):
        transport, link = await loop.create_connection(lambda: Link(received, lost), endpoint.address, endpoint.port)
    transport.write(endpoint.token.encode())
    return link


async def can_connect(endpoint: Endpoint) -> None:
    """Connect, and hang up without showing the token. Raises OSError."""
    _, writer = await asyncio.open_connection(endpoint.address, endpoint.port)
    writer.close()
    await writer.wait_closed()


async def listen(
    address: str, token: str, received: Callable[[Link, Message], None], lost: Callable[[Link], None]
) -> tuple[asyncio.Server, Endpoint]:
    """Accept connections that show the token, on a port that the system chooses."""
    handshakes: Handshakes[_ServerLink] = Handshakes(token)
    server = await asyncio.get_running_loop().create_server(
        lambda: _ServerLink(handshakes, received, lost), address, 0, family=socket.AF_UNSPEC, backlog=BACKLOG
    )
    port = server.sockets[0].getsockname()[1]
    return server, Endpoint(address=address, port=port, token=token)
