"""A listener whose thread admits connections that show the token, no matter how many strangers connect.

So the thread of the steps never waits for a stranger, and a process without free file descriptors continues to serve.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterable

from elastic_moe.actors.remote.codec import is_exhausted, new_token
from elastic_moe.actors.remote.handshakes import BACKLOG, Handshakes
from elastic_moe.cluster.messages.requests import Endpoint

logger = logging.getLogger(__name__)

_BACKLOG = 512
"""Connections that the kernel queues. The kernel of a further client tries again a second later."""
_PAUSE_S = 0.1
"""Seconds without accepting connections after the process has run out of file descriptors."""


class Door:
    """Accepts connections, and calls `admit` with a blocking socket for each that has shown the token."""

    def __init__(self, address: str, admit: Callable[[socket.socket], None]) -> None:
        self._admit = admit
        self._listener = socket.create_server((address, 0), family=_family(address), backlog=_BACKLOG)
        self._listener.setblocking(False)
        self.endpoint = Endpoint(address=address, port=self._listener.getsockname()[1], token=new_token())
        self._handshakes: Handshakes[socket.socket] = Handshakes(self.endpoint.token)
        self._selector = selectors.DefaultSelector()
        self._short = False
        """Whether the process had no file descriptor left for the last connection."""
        self._closed = False

    def close(self) -> None:
        self._closed = True
        # wakes the thread
        shut(self._listener)

    def run(self) -> None:
        """Accept connections until `close` is called."""
        with self._listener, self._selector:
            self._selector.register(self._listener, selectors.EVENT_READ)
            while not self._closed:
                ready = self._selector.select(self._handshakes.wait_s(time.monotonic()))
                # the listener comes last, so that newcomers are read before later ones can push them out
                for connection in sorted((key.fileobj for key, _ in ready), key=lambda end: end is self._listener):
                    assert isinstance(connection, socket.socket)
                    if connection is self._listener:
                        self._accept_some()
                    else:
                        self._read(connection)
                self._drop(self._handshakes.overdue(time.monotonic()))
            self._drop(self._handshakes.clear())

    def _accept_some(self) -> None:
        """Accept a limited number of connections, so that they do not push one another out before they are read."""
        for _ in range(BACKLOG):
            if not self._accept():
                return

    def _accept(self) -> bool:
        """Accept one connection. Returns whether there was one."""
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if is_exhausted(error) and not self._closed:
                self._make_room(error)
            return False
        self._short = False
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ)
        oldest = self._handshakes.begin(connection, time.monotonic())
        if oldest is not None:
            self._drop([oldest])
        return True

    def _make_room(self, error: OSError) -> None:
        if not self._short:
            logger.warning("no connection can be accepted: %s", error.strerror)
        self._short = True
        self._drop(self._handshakes.clear())
        time.sleep(_PAUSE_S)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(self._handshakes.missing(connection))
            complete = bool(data) and self._handshakes.show(connection, data) is not None
        except BlockingIOError:
            return
        except OSError:
            data, complete = b"", False
        if complete:
            self._selector.unregister(connection)
            connection.setblocking(True)
            self._admit(connection)
        elif not data:
            self._handshakes.end(connection)
            self._drop([connection])

    def _drop(self, connections: Iterable[socket.socket]) -> None:
        for connection in connections:
            self._selector.unregister(connection)
            connection.close()


def shut(connection: socket.socket) -> None:
    """Wake the thread that reads from `connection` or accepts on it, and end the connection for the other side."""
    with contextlib.suppress(OSError):  # it is not connected any more
        connection.shutdown(socket.SHUT_RDWR)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
