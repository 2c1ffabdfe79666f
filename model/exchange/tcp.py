"""All-to-all between workers of several nodes: one TCP connection for each pair, all of them served at once.

A message is a head (the number of the exchange and the length) and its bytes, so sizes need no exchange of their own.
All sockets are polled together: no worker waits for a slow one before it reads what others have sent. A peer that ends
closes its connections, and `abort` closes ours; either wakes whoever waits. A peer that is silent for too long is given
up. Tensors of a device travel through the CPU's memory.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from elastic_moe.cluster.errors import StepAborted

_HEAD = struct.Struct("<QQ")
_KEEP_ALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
"""Half a minute in all until the kernel gives a machine up that is gone: a worker may wait long for a quiet peer."""


class TcpTransport:
    """See the module."""

    launches = False

    def __init__(
        self, *, rank: int, connections: Mapping[int, socket.socket], names: Sequence[str], timeout_s: float
    ) -> None:
        """connections: to each other rank (exchange/meeting.py). names: of all workers, for errors. timeout_s: seconds
        without a byte from or to anybody after which an exchange is given up.

        Blocks until all ranks are here. Raises StepAborted.
        """
        self.rank = rank
        self.size = len(names)
        self._names = names
        self._timeout_s = timeout_s
        self._connections = dict(connections)
        self._peers = {connection.fileno(): peer for peer, connection in connections.items()}
        self._poll = select.poll()
        self._number = 0
        self._aborted = False
        self.gbps: dict[int, float] = {}
        """Gigabits per second between this worker and others, by rank, where they were measured."""
        self.slowest_gbps: float | None = None
        """Gigabits per second of the slowest link in the group. All its workers know it."""
        for connection in connections.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE:
                if hasattr(socket, option):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.all_to_all([[] for _ in names], [0] * self.size)

    def swap(self, peer: int, payload: bytes) -> bytes:
        """Send `payload` to one other rank, which calls this as well, and return what it sends. Raises StepAborted."""
        self.check()
        incoming = _Incoming(0, None)
        self._exchange({peer: memoryview(_HEAD.pack(0, len(payload)) + payload)}, {peer: incoming})
        return incoming.payload.numpy().tobytes()

    def all_to_all(self, send: Sequence[Sequence[Tensor]], recv_bytes: Sequence[int] | None) -> list[Tensor]:
        self._number += 1
        self.check()
        home = next((t.device for tensors in send for t in tensors), torch.device("cpu"))
        outgoing = {peer: memoryview(_message(self._number, send[peer])) for peer in self._connections}
        incoming = {
            peer: _Incoming(self._number, None if recv_bytes is None else int(recv_bytes[peer]))
            for peer in self._connections
        }
        self._exchange(outgoing, incoming)
        empty = torch.empty(0, dtype=torch.uint8, device=home)
        return [empty if r == self.rank else incoming[r].payload.to(home) for r in range(self.size)]

    def check(self) -> None:
        if self._aborted:
            raise StepAborted("the exchange was aborted")

    def abort(self) -> None:
        self._aborted = True
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):  # it has ended
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    # --- One exchange -------------------------------------------------------------------------------------------

    def _exchange(self, outgoing: dict[int, memoryview], incoming: Mapping[int, _Incoming]) -> None:
        """Send and receive until all is done, with the same peers. Empties `outgoing`."""
        try:
            self._carry(outgoing, dict(incoming))
        except StepAborted:
            # the peers wait for this worker, and its connections may hold half a message
            self.abort()
            raise

    def _carry(self, outgoing: dict[int, memoryview], waits: dict[int, _Incoming]) -> None:
        for peer in waits:
            # most messages fit into the kernel's buffer, and need no poll
            self._send(peer, outgoing)
            self._poll.register(self._connections[peer], _wish(peer, outgoing, waits))
        while outgoing or waits:
            ready = self._poll.poll(self._timeout_s * 1000)
            self.check()
            if not ready:
                silent = ", ".join(self._names[peer] for peer in {**waits, **outgoing})
                raise StepAborted(f"{silent} has not answered for {self._timeout_s:g} s")
            for descriptor, events in ready:
                peer = self._peers[descriptor]
                if events & select.POLLOUT and peer in outgoing:
                    self._send(peer, outgoing)
                if events & ~select.POLLOUT and peer in waits:
                    self._receive(peer, waits)
                wish = _wish(peer, outgoing, waits)
                if wish:
                    self._poll.modify(descriptor, wish)
                else:
                    self._poll.unregister(descriptor)

    def _send(self, peer: int, outgoing: dict[int, memoryview]) -> None:
        with self._blaming(peer):
            outgoing[peer] = outgoing[peer][self._connections[peer].send(outgoing[peer]) :]
        if not outgoing[peer]:
            del outgoing[peer]

    def _receive(self, peer: int, waits: dict[int, _Incoming]) -> None:
        with self._blaming(peer):
            if not waits[peer].receive(self._connections[peer]):
                raise ConnectionResetError(0, "it was closed")
        if waits[peer].complete:
            del waits[peer]

    @contextlib.contextmanager
    def _blaming(self, peer: int) -> Iterator[None]:
        """Turns an error of the peer's connection into StepAborted. A call that would block does nothing."""
        try:
            yield
        except BlockingIOError:
            pass
        except OSError as error:
            self.check()
            raise StepAborted(f"the connection to {self._names[peer]} has ended: {error.strerror}") from None


def _wish(peer: int, outgoing: Mapping[int, memoryview], waits: Mapping[int, _Incoming]) -> int:
    """What to poll the peer's connection for; 0 if all is done with it."""
    return (select.POLLIN if peer in waits else 0) | (select.POLLOUT if peer in outgoing else 0)


def _message(number: int, tensors: Sequence[Tensor]) -> bytes:
    parts = [t.contiguous().view(-1).view(torch.uint8).cpu().numpy().data for t in tensors]
    return b"".join([_HEAD.pack(number, sum(map(len, parts))), *parts])


class _Incoming:
    """A message as it arrives, and not one byte of the next one."""

    def __init__(self, number: int, size: int | None) -> None:
        """size: of its payload; None if only its head tells."""
        self._expected = number, size
        self._head = bytearray(_HEAD.size)
        self._missing = [memoryview(self._head)]
        self._received = 0
        self.payload = torch.empty(0, dtype=torch.uint8)
        if size is not None:
            self._make_room(size)

    @property
    def complete(self) -> bool:
        return not self._missing

    def receive(self, connection: socket.socket) -> bool:
        """Read what there is. Returns False at the connection's end. Raises StepAborted for an unexpected message."""
        count = connection.recvmsg_into(self._missing)[0]
        before, self._received = self._received, self._received + count
        if before < _HEAD.size <= self._received:
            self._read_head()
        left = count
        while left:
            taken = min(left, len(self._missing[0]))
            left -= taken
            self._missing[0] = self._missing[0][taken:]
            if not self._missing[0]:
                del self._missing[0]
        return count > 0

    def _read_head(self) -> None:
        number, size = _HEAD.unpack(self._head)
        expected, known = self._expected
        if number != expected or known not in (None, size):
            raise StepAborted(f"expected exchange {expected} of {known} bytes, exchange {number} of {size} bytes came")
        if known is None:
            self._make_room(size)

    def _make_room(self, size: int) -> None:
        if size:
            self.payload = torch.empty(size, dtype=torch.uint8)
            self._missing.append(self.payload.numpy().data)
