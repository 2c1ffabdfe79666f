"""Connections that have still to show the token: a limited number of them, each for a limited time.

Whoever listens (actors/remote/links.py, actors/remote/door.py) keeps its newcomers here. Strangers who connect and say
nothing, or a byte now and then, only get into one another's way: a newcomer too many ends the oldest, and whoever has
the token sends it at once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from elastic_moe.actors.remote.codec import TOKEN_BYTES, WireError, opens

Connection = TypeVar("Connection", bound=Hashable)

TOKEN_S = 5.0
"""Seconds that a connection gets for its whole token."""
MOST = 256
"""Connections without a token that are kept at a time."""
BACKLOG = 64
"""Connections that the kernel keeps for a listener. An event loop may accept them all twice over before it reads from
one of them, so this is well below `MOST`."""


@dataclass(slots=True)
class _Newcomer:
    until: float
    shown: bytes = b""


class Handshakes(Generic[Connection]):
    """Says which connections are let in and which are to be closed. Does no input or output itself."""

    def __init__(self, token: str, *, most: int = MOST, token_s: float = TOKEN_S) -> None:
        self._token = token
        self._most = most
        self._token_s = token_s
        self._newcomers: dict[Connection, _Newcomer] = {}
        """In the order in which they came, which is the order of their deadlines."""

    def __len__(self) -> int:
        return len(self._newcomers)

    def begin(self, connection: Connection, now: float) -> Connection | None:
        """Expect the token from `connection`. Returns the connection that has to be closed for it, if any."""
        self._newcomers[connection] = _Newcomer(until=now + self._token_s)
        if len(self._newcomers) <= self._most:
            return None
        oldest = next(iter(self._newcomers))
        del self._newcomers[oldest]
        return oldest

    def missing(self, connection: Connection) -> int:
        """How many bytes of its token have not come yet."""
        return TOKEN_BYTES - len(self._newcomers[connection].shown)

    def show(self, connection: Connection, data: bytes) -> bytes | None:
        """Take what came from `connection`. Returns what follows the token, None while the token is not complete.

        The connection is a newcomer no longer once the token is complete. Raises WireError where it is wrong.
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
        """It has been closed. Harmless where it is no newcomer."""
        self._newcomers.pop(connection, None)

    def overdue(self, now: float) -> list[Connection]:
        """Those whose time is up. They are newcomers no longer, and have to be closed."""
        late = [connection for connection, newcomer in self._newcomers.items() if newcomer.until <= now]
        for connection in late:
            del self._newcomers[connection]
        return late

    def wait_s(self, now: float) -> float | None:
        """Seconds until the next one is overdue; None where there are no newcomers."""
        oldest = next(iter(self._newcomers.values()), None)
        return None if oldest is None else max(0.0, oldest.until - now)

    def clear(self) -> list[Connection]:
        """All of them, to be closed."""
        connections = list(self._newcomers)
        self._newcomers.clear()
        return connections
