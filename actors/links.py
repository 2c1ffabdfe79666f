"""Connections on an event loop that carry the messages of actors/wire.py: questions with answers, and news."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from actors.liveness import CONNECT_S
from actors.wire import TOKEN_BYTES, Frames, Message, WireError, encode, keep_alive, opens
from cluster.errors import HostError, RequestError, StepAborted
from cluster.protocol import Done, Endpoint, Failed, Refused, StepResult

logger = logging.getLogger(__name__)

_ANSWERS = (Done, Failed, Refused, StepResult)


class Link(asyncio.Protocol):
    """One end of a connection. `call` asks and awaits the answer, in order; anything else goes to `received`."""

    def __init__(self, received: Callable[[Link, Message], None], lost: Callable[[Link], None]) -> None:
        """`lost` is called once, when the connection has ended for whatever reason."""
        self._received = received
        self._lost = lost
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self._asked: deque[asyncio.Future[Any]] = deque()
        self.closed = False

    def send(self, message: Message) -> None:
        """Into the void where the connection has ended."""
        if self._transport is not None and not self.closed:
            self._transport.write(encode(message))

    def call(self, message: Message) -> asyncio.Future[Any]:
        """The answer, in the order of calls. Raises what the answer says, ConnectionError where none can come."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.closed:
            future.set_exception(ConnectionError("the connection has ended"))
            return future
        self._asked.append(future)
        self.send(message)
        return future

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- Called by the loop -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._frames.feed(data)
        except WireError as error:
            logger.warning("a connection is closed: %s", error)
            self.close()
            return
        for message in messages:
            if isinstance(message, _ANSWERS):
                self._answered(message)
            else:
                self._received(self, message)

    def _answered(self, message: Message) -> None:
        if not self._asked:
            logger.warning("a connection is closed: an answer to nothing")
            self.close()
            return
        future = self._asked.popleft()
        # whoever asked may have stopped waiting
        if future.done():
            return
        error = _error(message)
        if error is None:
            future.set_result(message)
        else:
            future.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        for future in self._asked:
            if not future.done():
                future.set_exception(ConnectionError("the connection has ended"))
        self._asked.clear()
        self._lost(self)


class _ServerLink(Link):
    """The end that is connected to: says nothing and decodes nothing until it has seen the token."""

    def __init__(self, token: str, received: Callable[[Link, Message], None], lost: Callable[[Link], None]) -> None:
        super().__init__(received, lost)
        self._token = token
        self._shown: bytes | None = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        asyncio.get_running_loop().call_later(CONNECT_S, self._expect)

    def _expect(self) -> None:
        if self._shown is not None:
            self.close()

    def data_received(self, data: bytes) -> None:
        if self._shown is not None:
            self._shown += data
            if len(self._shown) < TOKEN_BYTES:
                return
            shown, data = self._shown[:TOKEN_BYTES], self._shown[TOKEN_BYTES:]
            if not opens(self._token, shown):
                self.close()
                return
            self._shown = None
        super().data_received(data)


def _error(message: Message) -> Exception | None:
    if isinstance(message, Failed):
        return StepAborted(message.reason) if message.aborted else HostError(message.reason)
    if isinstance(message, Refused):
        return RequestError(message.message, param=message.param, code=message.code, status=message.status)
    return None


async def connect(endpoint: Endpoint, received: Callable[[Link, Message], None], lost: Callable[[Link], None]) -> Link:
    """Raises OSError, of which TimeoutError is one."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_S):
        transport, link = await loop.create_connection(lambda: Link(received, lost), endpoint.address, endpoint.port)
    transport.write(endpoint.token.encode())
    return link


async def listen(
    address: str, token: str, received: Callable[[Link, Message], None], lost: Callable[[Link], None]
) -> tuple[asyncio.Server, Endpoint]:
    """Take connections from whoever has the token, on a port of the system's choice."""
    server = await asyncio.get_running_loop().create_server(
        lambda: _ServerLink(token, received, lost), address, 0, family=socket.AF_UNSPEC
    )
    port = server.sockets[0].getsockname()[1]
    return server, Endpoint(address=address, port=port, token=token)
