"""Connections that have not shown the token yet: their number and their time are limited.

Each listener (actors/remote/links.py, actors/remote/door.py) keeps its newcomers here. A stranger that connects and
sends nothing, or one byte now and then, cannot block a client that has the token: when there are too many newcomers,
the oldest is closed, and a client sends its token at once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from elastic_moe.actors.liveness import TOKEN_S
from elastic_moe.actors.remote.codec import TOKEN_BYTES, WireError, opens

Connection = TypeVar("Connection", bound=Hashable)

MOST = 256
"""Largest number of newcomers at a time."""
BACKLOG = 64
"""Connections that the kernel queues for a listener. An event loop may accept a full queue twice before it reads from
one of them, so this is well below `MOST`."""


@dataclass(slots=True)
class _Newcomer:
    until: float
    shown: bytes = b""


class Handshakes(Generic[Connection]):
    """Decides which connections are let in and which must be closed. It does no input or output itself."""

    def __init__(self, token: str, *, most: int = MOST, token_s: float = TOKEN_S) -> None:
        self._token = token
        self._most = most
        self._token_s = token_s
        self._newcomers: dict[Connection, _Newcomer] = {}
        """In order of arrival, which is also the order of their deadlines."""

    def __len__(self) -> int:
        return len(self._newcomers)

    def begin(self, connection: Connection, now: float) -> Connection | None:
        """Add a newcomer. Returns the oldest newcomer, to be closed, if there are too many."""
        self._newcomers[connection] = _Newcomer(until=now + self._token_s)
        if len(self._newcomers) <= self._most:
            return None
        oldest = next(iter(self._newcomers))
        del self._newcomers[oldest]
        return oldest

    def missing(self, connection: Connection) -> int:
        """Number of bytes of its token that have not arrived."""
        return TOKEN_BYTES - len(self._newcomers[connection].shown)

    def show(self, connection: Connection, data: bytes) -> bytes | None:
        """Take bytes that a newcomer sent. Returns the bytes after the token, or None if the token is not complete.

        With the complete token the connection stops being a newcomer. Raises WireError if the token is wrong.
        """
        newcomer = self._newcomers[connection]
        newcomer.shown += data
        if len(newcomer.shown) < TOKEN_BYTES:
            return None
        del self._newcomers[connection]
        if not opens(self._token, newcomer.shown[:TOKEN_BYTES]):
            raise WireError("the token is wrong")
        return newcomer.shown[TOKEN_BYTES:]

    def end(self, connection: Connection) -> None:
        """Remove a connection that was closed. Does nothing if it is no newcomer."""
        self._newcomers.pop(connection, None)

    def overdue(self, now: float) -> list[Connection]:
        """Remove and return the newcomers whose time is over. The caller closes them."""
        late = [connection for connection, newcomer in self._newcomers.items() if newcomer.until <= now]
        for connection in late:
            del self._newcomers[connection]
        return late

    def wait_s(self, now: float) -> float | None:
        """Seconds until the next newcomer is overdue; None if there are no newcomers."""
        oldest = next(iter(self._newcomers.values()), None)
        return None if oldest is None else max(0.0, oldest.until - now)

    def clear(self) -> list[Connection]:
        """Remove and return all newcomers. The caller closes them."""
        connections = list(self._newcomers)
        self._newcomers.clear()
        return connections
