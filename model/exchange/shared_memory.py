"""All-to-all between processes of one node through shared memory: publish, wait, read.

Every rank owns one segment. For each peer it has a sequence number and two buffers, which are used in turn. A message
is written as its payload, its length, and then its sequence number. x86 keeps stores in that order, so a reader that
sees the number sees the payload. Two buffers suffice: a rank writes exchange n+2 after it has read every peer's
exchange n+1, and a peer sends that when it has read exchange n. Ranks open their segments as in the native exchange
(model/native/segments.py).
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.model.native.segments import join

_LINE = 64
"""Bytes between words that different processes write or read: the size of a cache line."""
_SPINS = 200
"""Tries before a waiting rank yields its core."""
_YIELDS = 2000
"""Tries with a yield before a waiting rank sleeps. Peers share its cores, and a sleep costs 60 us."""


class SharedMemoryTransport:
    """See the module. The constructor blocks until all ranks have joined, and raises StepAborted after `timeout_s`."""

    launches = False

    def __init__(self, *, group: str, rank: int, size: int, max_bytes: int, timeout_s: float) -> None:
        """`group` is unique on the node; `max_bytes` bounds one message from one rank to another."""
        self.rank = rank
        self.size = size
        self._timeout_s = timeout_s
        self._aborted = False
        self._exchange = 0
        self._capacity = -(-max_bytes // _LINE) * _LINE
        self._segments: list[_Segment] = []

        def meet(memories: Sequence[mmap.mmap]) -> None:
            self._segments = [_Segment(memory, size, self._capacity) for memory in memories]
            # an empty exchange returns when every rank has opened all segments
            self.all_to_all([[] for _ in range(size)], None)

        join(group, rank, size, _total(size, self._capacity), timeout_s, meet)

    def all_to_all(self, send: Sequence[Sequence[Tensor]], recv_bytes: Sequence[int] | None) -> list[Tensor]:
        self._exchange += 1
        parity = self._exchange % 2
        for peer, tensors in enumerate(send):
            if peer != self.rank:
                self._segments[self.rank].publish(peer, parity, tensors, self._exchange)
        received: list[Tensor] = []
        for peer, segment in enumerate(self._segments):
            if peer == self.rank:
                received.append(torch.empty(0, dtype=torch.uint8))
                continue
            self._wait(segment, self._exchange)
            received.append(segment.read(self.rank, parity))
        return received

    def check(self) -> None: ...

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        self._segments = []

    def _wait(self, segment: _Segment, number: int) -> None:
        sequence, index = segment.sequence, self.rank
        for _ in range(_SPINS):
            if sequence[index * 8] >= number:
                return
        deadline = time.monotonic() + self._timeout_s
        tries = 0
        while sequence[index * 8] < number:
            if self._aborted:
                raise StepAborted("the exchange was aborted")
            if time.monotonic() > deadline:
                raise StepAborted(f"a peer has not answered for {self._timeout_s:g} s")
            tries += 1
            if tries < _YIELDS:
                os.sched_yield()
            else:
                time.sleep(0.0001)


class _Segment:
    """One rank's outgoing messages: `sequence` and `length` words for each peer, then two buffers for each peer."""

    def __init__(self, memory: mmap.mmap, size: int, capacity: int) -> None:
        words = _LINE // 8
        self.sequence = np.frombuffer(memory, dtype=np.int64, count=size * words)
        self._lengths = np.frombuffer(memory, dtype=np.int64, count=2 * size * words, offset=size * _LINE)
        start = 3 * size * _LINE
        data = torch.frombuffer(memory, dtype=torch.uint8)[start:]
        self._buffers = data.view(2, size, capacity)
        self._capacity = capacity
        self._size = size

    def publish(self, peer: int, parity: int, tensors: Sequence[Tensor], number: int) -> None:
        buffer, at = self._buffers[parity, peer], 0
        for tensor in tensors:
            raw = tensor.contiguous().view(-1).view(torch.uint8)
            assert at + raw.numel() <= self._capacity, "a message is larger than the group was made for"
            buffer[at : at + raw.numel()].copy_(raw)
            at += raw.numel()
        self._lengths[(parity * self._size + peer) * 8] = at
        self.sequence[peer * 8] = number

    def read(self, reader: int, parity: int) -> Tensor:
        return self._buffers[parity, reader, : int(self._lengths[(parity * self._size + reader) * 8])]


def _total(size: int, capacity: int) -> int:
    return 3 * size * _LINE + 2 * size * capacity
