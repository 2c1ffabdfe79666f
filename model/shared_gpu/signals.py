"""Words in the host's memory by which the workers of one GPU tell each other how far they are.

Every rank has a segment of /dev/shm that all ranks map, and that the GPU reaches. It holds, for each other rank, the
number of the last exchange for which that rank's bytes have arrived here, which that rank's stream writes, and two
words that its CPU writes: that it has aborted, and that it has closed its mapping of this rank's memory. Numbers are
of 32 bits and wrap around.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

LINE = 64
"""Bytes between words that different processes write: the size of a cache line."""
_BITS = 1 << 32
_AHEAD = 1 << 30
"""A number so far ahead ends every wait that was launched."""


def following(number: int, by: int = 1) -> int:
    return (number + by) % _BITS


def reached(word: int, number: int) -> bool:
    """Whether the word has reached the number. The GPU compares in the same way."""
    return (word - number) % _BITS < _BITS // 2


def segment_bytes(size: int) -> int:
    """Of each of `size` ranks: whole pages."""
    return -(-3 * size * LINE // mmap.PAGESIZE) * mmap.PAGESIZE


class Signals:
    """The segments of all ranks, as one of them uses them."""

    def __init__(self, memories: Sequence[mmap.mmap], rank: int) -> None:
        self._rank = rank
        size = len(memories)
        self._peers = [peer for peer in range(size) if peer != rank]
        # [kind, rank that writes] of each rank that reads
        words = [np.frombuffer(memory, np.uint32, count=3 * size * LINE // 4)[:: LINE // 4] for memory in memories]
        self._arrived, self._aborted, self._closed = ([w.reshape(3, size)[kind] for w in words] for kind in range(3))

    def arrived(self) -> tuple[int, ...]:
        """The last exchange of each other rank whose bytes are here."""
        return tuple(int(self._arrived[self._rank][peer]) for peer in self._peers)

    def has_arrived(self, peer: int, number: int) -> bool:
        return reached(int(self._arrived[self._rank][peer]), number)

    def release(self, launched: int) -> None:
        """End all waits of this rank's stream. A slow peer's stream may still write, so it takes more than one call."""
        for peer in self._peers:
            self._arrived[self._rank][peer] = following(launched, _AHEAD)

    def tell_aborted(self) -> None:
        for peer in self._peers:
            self._aborted[peer][self._rank] = 1

    def aborted_peers(self) -> list[int]:
        return [peer for peer in self._peers if self._aborted[self._rank][peer]]

    def tell_closed(self) -> None:
        for peer in self._peers:
            self._closed[peer][self._rank] = 1

    def open_peers(self) -> list[int]:
        """The ranks that may still write into this rank's memory."""
        return [peer for peer in self._peers if not self._closed[self._rank][peer]]


def arrival_offset(source: int) -> int:
    """Where in a rank's segment the word is that the stream of rank `source` writes."""
    return source * LINE


class Silence:
    """How long nobody has moved while this rank waits for somebody."""

    def __init__(self, now: float) -> None:
        self._seen: tuple[int, tuple[int, ...]] = (0, ())
        self._since = now

    def lasts_s(self, launched: int, arrived: tuple[int, ...], now: float) -> float:
        """Seconds since a number has changed; 0 if all have reached `launched`, this rank's last exchange."""
        if (launched, arrived) != self._seen or all(reached(word, launched) for word in arrived):
            self._seen, self._since = (launched, arrived), now
        return now - self._since
