"""A way past ASGI to the connection of a response that is being sent: for parts of a stream that need not wait.

uvicorn's fast protocol writes each part to the connection without waiting, unless the client reads too slowly. This
file makes that way known to the application, by a key in the scope of its requests; tests/deploy/web/test_direct.py
holds that the installed uvicorn still has the attributes.

Parts of many responses that come together are collected, and sent when the event loop goes on. To send each at once
would take three times as long: the kernel's code and the interpreter's would drive each other out of the processor's
caches.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from uvicorn.protocols.http import httptools_impl

from elastic_moe.deploy.web.old_http import Cycle

CONNECTION = "emoe.connection"
"""The key, in the scope of a request, of a reference to its connection."""


_unsent: WeakKeyDictionary[asyncio.AbstractEventLoop, list[DirectCycle]] = WeakKeyDictionary()
"""The connections of each loop that have parts to be sent."""


class DirectCycle(Cycle):
    """One request and its response, which is written by ASGI's `send` and by `write` in turn."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.loop = asyncio.get_running_loop()
        self._together = _unsent.setdefault(self.loop, [])
        self._parts: list[bytes] = []
        """Parts that are to be sent."""
        self._streams = False
        """Whether the response has begun, in chunks, and has not ended."""
        # not a reference to itself, which would have to be collected
        vars(self)["scope"][CONNECTION] = weakref.ref(self)

    @property
    def takes_more(self) -> bool:
        """Whether a part may be written now: the response has begun, in chunks, and its client reads fast enough."""
        return self._streams and not self.flow.write_paused and not self.disconnected

    async def send(self, message: Any) -> None:
        self.flush()
        await super().send(message)
        self._streams = self.chunked_encoding is True and not self.response_complete

    def write(self, body: bytes) -> None:
        """Send a part, which is not empty, when the loop goes on. Only while `takes_more`."""
        if not self._parts:
            if not self._together:
                self.loop.call_soon(_flush, self._together)
            self._together.append(self)
        self._parts.append(b"%x\r\n%b\r\n" % (len(body), body))

    def flush(self) -> None:
        """Send the parts that `write` was given."""
        if self._parts:
            parts, self._parts = self._parts, []
            if not self.disconnected:
                self.transport.write(parts[0] if len(parts) == 1 else b"".join(parts))


def _flush(together: list[DirectCycle]) -> None:
    cycles = together[:]
    together.clear()
    for cycle in cycles:
        cycle.flush()


def serve_directly() -> None:
    """Make every uvicorn server of this process do so, from its next request on; and old_http.py's part as well."""
    vars(httptools_impl)["RequestResponseCycle"] = DirectCycle


def connection_of(scope: Mapping[str, Any]) -> DirectCycle | None:
    """The connection of a request; None where another server or another event loop has it."""
    reference = scope.get(CONNECTION)
    connection: DirectCycle | None = None if reference is None else reference()
    return connection if connection is not None and connection.loop is asyncio.get_running_loop() else None
