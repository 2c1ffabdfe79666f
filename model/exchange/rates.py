"""How fast the links between workers are: measured in pairs, when a group has formed.

In each round a worker swaps messages with one other, both ways at once, so that each measures the way between the two
and not what others take of it. A message grows until it takes long enough to be timed, so a slow link is not held up.
"""

from __future__ import annotations

import math
import struct
import time

import torch

from elastic_moe.model.exchange.tcp import TcpTransport

_SIZES = (1 << 16, 1 << 19, 1 << 22)
"""Bytes of the messages."""
_LONG_S = 0.004
"""A message that took so many seconds is timed well enough."""
_TRIES = 3
"""Times that a message is sent. The shortest counts: on a busy machine a process may be held up for as long as that."""
_ROUNDS = 8
"""Most rounds: in a large group a worker measures some of its links."""
_GIGABIT = 1e9 / 8
_SECONDS = struct.Struct("<d")


def measure(transport: TcpTransport) -> None:
    """Set `gbps` and `slowest_gbps` of the transport. Every worker of the group must call it.

    Raises StepAborted if a peer is gone.
    """
    size = transport.size
    step = -(-size // _ROUNDS)
    for turn in range(0, size, step):
        peer = (turn - transport.rank) % size
        if peer != transport.rank:
            transport.gbps[peer] = _with_one(transport, peer)
    mine = torch.tensor([min(transport.gbps.values(), default=math.inf)], dtype=torch.float64)
    others = transport.all_to_all([[mine]] * size, None)
    slowest = [raw.view(torch.float64).item() for rank, raw in enumerate(others) if rank != transport.rank]
    transport.slowest_gbps = min(float(mine.item()), *slowest)


def _with_one(transport: TcpTransport, peer: int) -> float:
    took_s = 0.0
    nbytes = 0
    for nbytes in _SIZES:
        took_s = min(_swap_s(transport, peer, bytes(nbytes)) for _ in range(_TRIES))
        if took_s >= _LONG_S:
            break
    return nbytes / took_s / _GIGABIT


def _swap_s(transport: TcpTransport, peer: int, message: bytes) -> float:
    """Seconds to swap `message`. Both begin together, and agree on the longer of their times."""
    transport.swap(peer, b"")
    begin = time.perf_counter()
    transport.swap(peer, message)
    mine = time.perf_counter() - begin
    (theirs,) = _SECONDS.unpack(transport.swap(peer, _SECONDS.pack(mine)))
    return max(mine, float(theirs))
