"""How the workers of a group find one another over TCP: each opens a door, and knocks at the doors of lower ranks.

A door listens at the address by which other nodes know this worker, and nobody resolves a name. Whoever knocks shows
the door's token and tells its rank; strangers are hung up on. Joining blocks only the thread that joins, has a limit of
time, and can be given up by another thread.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.cluster.messages.requests import Endpoint

TOKEN_BYTES = 32
_RANK = struct.Struct("<I")
_KNOCK_BYTES = TOKEN_BYTES + _RANK.size
_LOOK_S = 0.1
"""Seconds between two looks at whether the meeting was given up."""
_STRANGERS = 64
"""Most connections that have not shown the token yet; a further one takes the place of the oldest."""


class Connection(socket.socket):
    """A socket that is closed when nothing refers to it: a group may be dropped in the middle of anything."""

    def __del__(self) -> None:
        self.close()


@dataclass(slots=True)
class _Mesh:
    """What `Meeting.join` has reached so far."""

    connections: dict[int, Connection] = field(default_factory=dict)
    """Connections that are made, by rank."""
    knocking: dict[Connection, int] = field(default_factory=dict)
    """Connections that are being made, to which rank."""
    heard: dict[Connection, bytearray] = field(default_factory=dict)
    """Connections of others that knocked here, the oldest first, with the bytes that have come so far."""


class Meeting:
    """A worker's door for one group. Use it once."""

    def __init__(self, address: str) -> None:
        """`address`: IP address of this node that the others reach it at. Raises OSError."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = Connection(family, socket.SOCK_STREAM)
        self._listener.bind((address, 0))
        self._listener.listen(_STRANGERS)
        self._listener.setblocking(False)
        self.endpoint = Endpoint(
            address=address, port=self._listener.getsockname()[1], token=secrets.token_hex(TOKEN_BYTES // 2)
        )
        self._mesh = _Mesh()
        self._given_up = False

    def join(
        self, rank: int, doors: Sequence[Endpoint], names: Sequence[str], timeout_s: float
    ) -> dict[int, Connection]:
        """Connections to all other ranks, which do not block. Blocks until all are there.

        doors: of every rank. names: of the workers, for errors.
        Raises StepAborted where one cannot be reached, has not come in time, or after `give_up`.
        """
        deadline = time.monotonic() + timeout_s
        mesh = self._mesh
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._listener, selectors.EVENT_READ)
                for peer in range(rank):
                    self._knock(selector, doors[peer], peer, names[peer])
                while len(mesh.connections) < len(doors) - 1:
                    self._look(names, [peer for peer in range(len(doors)) if peer != rank], deadline, timeout_s)
                    for key, _ in selector.select(_LOOK_S):
                        self._serve(selector, key.fileobj, rank, doors, names)
        except BaseException:
            self._hang_up(mesh.connections.values())
            raise
        finally:
            self._hang_up([*mesh.knocking, *mesh.heard])
            self.close()
        return mesh.connections

    def give_up(self) -> None:
        """End `join`, and every exchange over its connections. Another thread calls it."""
        self._given_up = True
        for connection in list(self._mesh.connections.values()):
            with contextlib.suppress(OSError):  # it has ended
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening. Connections stay."""
        self._listener.close()

    # --- Joining ------------------------------------------------------------------------------------------------

    def _look(self, names: Sequence[str], peers: Sequence[int], deadline: float, timeout_s: float) -> None:
        if self._given_up:
            raise StepAborted("the group was given up")
        if time.monotonic() > deadline:
            missing = ", ".join(names[peer] for peer in peers if peer not in self._mesh.connections)
            raise StepAborted(f"{missing} did not join within {timeout_s:g} s")

    def _knock(self, selector: selectors.BaseSelector, door: Endpoint, peer: int, name: str) -> None:
        connection = Connection(self._listener.family, socket.SOCK_STREAM)
        self._mesh.knocking[connection] = peer
        connection.setblocking(False)
        try:
            connection.bind((self.endpoint.address, 0))
            with contextlib.suppress(BlockingIOError):
                connection.connect((door.address, door.port))
        except OSError as error:
            raise self._unreachable(name, door, error) from None
        selector.register(connection, selectors.EVENT_WRITE)

    def _serve(
        self,
        selector: selectors.BaseSelector,
        ready: object,
        rank: int,
        doors: Sequence[Endpoint],
        names: Sequence[str],
    ) -> None:
        mesh = self._mesh
        if ready is self._listener:
            self._accept(selector)
        elif isinstance(ready, Connection) and ready in mesh.knocking:
            peer = mesh.knocking[ready]
            code = ready.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            selector.unregister(ready)
            try:
                if code:
                    raise OSError(code, os.strerror(code))
                # it fits into the kernel's buffer
                ready.sendall(doors[peer].token.encode() + _RANK.pack(rank))
            except OSError as error:
                raise self._unreachable(names[peer], doors[peer], error) from None
            del mesh.knocking[ready]
            mesh.connections[peer] = ready
        elif isinstance(ready, Connection) and ready in mesh.heard:
            self._hear(selector, ready, rank, len(doors))

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection = Connection(fileno=self._listener.accept()[0].detach())
        except OSError:
            return  # it has hung up meanwhile
        connection.setblocking(False)
        heard = self._mesh.heard
        if len(heard) >= _STRANGERS:
            self._turn_away(selector, next(iter(heard)))
        heard[connection] = bytearray()
        selector.register(connection, selectors.EVENT_READ)

    def _hear(self, selector: selectors.BaseSelector, connection: Connection, rank: int, size: int) -> None:
        heard = self._mesh.heard
        said = heard[connection]
        try:
            piece = connection.recv(_KNOCK_BYTES - len(said))
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        said += piece
        if len(said) == _KNOCK_BYTES and hmac.compare_digest(bytes(said[:TOKEN_BYTES]), self.endpoint.token.encode()):
            [peer] = _RANK.unpack(said[TOKEN_BYTES:])
            if rank < peer < size and peer not in self._mesh.connections:
                selector.unregister(connection)
                del heard[connection]
                self._mesh.connections[peer] = connection
                return
        if not piece or len(said) == _KNOCK_BYTES:
            self._turn_away(selector, connection)

    def _turn_away(self, selector: selectors.BaseSelector, connection: Connection) -> None:
        selector.unregister(connection)
        del self._mesh.heard[connection]
        connection.close()

    def _unreachable(self, name: str, door: Endpoint, error: OSError) -> StepAborted:
        return StepAborted(
            f"{name} cannot be reached at {door.address}:{door.port} from {self.endpoint.address}:"
            f" {error.strerror or type(error).__name__}"
        )

    def _hang_up(self, connections: Iterable[Connection]) -> None:
        for connection in connections:
            connection.close()
