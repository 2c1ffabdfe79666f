"""The device memory of a group of processes on one rank, and where messages lie in it."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

_ALIGNED = 256
"""Bytes to which a message is aligned."""


class Device(Protocol):
    """What the exchange needs of a GPU. driver.py has it, and says what each method does."""

    def again(self) -> Device: ...
    def attach(self) -> None: ...
    def aside(self) -> AbstractContextManager[Any]: ...
    def follow(self) -> None: ...
    def allocate(self, num_bytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def export(self, address: int) -> bytes: ...
    def open(self, handle: bytes) -> int: ...
    def close(self, address: int) -> None: ...
    def register(self, memory: mmap.mmap) -> int: ...
    def unregister(self, memory: mmap.mmap) -> None: ...
    def view(self, address: int, num_bytes: int) -> Tensor: ...
    def copy(self, address: int, source: Tensor) -> None: ...
    def write(self, address: int, value: int) -> None: ...
    def wait(self, address: int, value: int) -> None: ...
    def mark(self) -> Callable[[], bool]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Inbox:
    """Where in a rank's memory the messages of the others are."""

    size: int
    """Number of ranks."""
    capacity: int
    """Bytes of one message, aligned."""

    @property
    def num_bytes(self) -> int:
        return 2 * (self.size - 1) * self.capacity

    def offset(self, number: int, *, source: int, owner: int) -> int:
        """Where rank `source` puts its message of exchange `number` in the inbox of rank `owner`."""
        place = source - (source > owner)
        return (number % 2 * (self.size - 1) + place) * self.capacity


def inbox(size: int, max_bytes: int) -> Inbox:
    """For messages of at most `max_bytes`."""
    return Inbox(size=size, capacity=max(1, -(-max_bytes // _ALIGNED)) * _ALIGNED)


class Mapped:
    """The memory of a group on one rank: what it owns, and what it has mapped of the others."""

    def __init__(self, device: Device, rank: int, memories: Sequence[mmap.mmap]) -> None:
        self.device = device
        self.own: int | None = None
        self.peers: dict[int, int] = {}
        self.words: dict[int, int] = {}
        """The segments' addresses for the device, by rank."""
        self._rank = rank
        self._memories = memories

    def make(self, num_bytes: int) -> bytes:
        """Make this rank's own memory. Returns its handle. Raises DeviceError."""
        self.device.attach()
        for rank, memory in enumerate(self._memories):
            self.words[rank] = self.device.register(memory)
        self.own = self.device.allocate(num_bytes)
        return self.device.export(self.own)

    def open(self, handles: Sequence[bytes]) -> bool:
        """Returns True. Raises DeviceError."""
        for rank, handle in enumerate(handles):
            if rank != self._rank:
                self.peers[rank] = self.device.open(handle)
        return True

    def close_peers(self) -> None:
        while self.peers:
            self.device.close(self.peers.popitem()[1])

    def free(self) -> None:
        """No stream may use the words now, and no peer this rank's memory."""
        if self.own is not None:
            self.device.free(self.own)
            self.own = None
        while self.words:
            self.device.unregister(self._memories[self.words.popitem()[0]])
