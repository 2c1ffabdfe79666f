"""Joins the workers that share a GPU, and tries the exchange on it before they rely on it."""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.model.exchange.shared_memory import SharedMemoryTransport
from elastic_moe.model.native import segments
from elastic_moe.model.shared_gpu.driver import DeviceError
from elastic_moe.model.shared_gpu.memory import Device, Inbox, Mapped, inbox
from elastic_moe.model.shared_gpu.signals import Signals, segment_bytes
from elastic_moe.model.shared_gpu.transport import DeviceMemoryTransport, agree, tell
from elastic_moe.model.shared_gpu.watch import Watch

logger = logging.getLogger(__name__)

_TURNS, _PROBE_BYTES, _PROBE_S = 3, 1 << 16, 20.0
"""Exchanges that a new group makes to see that it works, their bytes, and the seconds that they may take."""
_LARGEST_CARD = 64
"""Bytes of what ranks tell each other over the host when they join: a handle of the driver."""

R = TypeVar("R")


def join_on_device(
    device: Device, *, group: str, rank: int, names: Sequence[str], max_bytes: int, timeout_s: float
) -> DeviceMemoryTransport | None:
    """Join the workers of a GPU, whose names these are. None, on all ranks, if one of them cannot share memory.

    `group` is unique on the node; `max_bytes` bounds one message. Blocks until all ranks have joined. Raises
    StepAborted if a worker does not join within `timeout_s`.
    """
    size = len(names)
    host = SharedMemoryTransport(
        group=f"{group}-gpu", rank=rank, size=size, max_bytes=_LARGEST_CARD, timeout_s=timeout_s
    )
    memories: list[mmap.mmap] = []

    def meet(found: Sequence[mmap.mmap]) -> None:
        memories.extend(found)
        tell(host, b"")

    segments.join(f"{group}-words", rank, size, segment_bytes(size), timeout_s, meet)
    layout, mapped, signals = inbox(size, max_bytes), Mapped(device, rank, memories), Signals(memories, rank)
    try:
        pids = [int.from_bytes(raw, "little") for raw in tell(host, os.getpid().to_bytes(8, "little"))]
        handles = tell(host, _try(lambda: mapped.make(layout.num_bytes)) or b"")
        opened = agree(host, all(handles) and _try(lambda: mapped.open(handles)))
        if not opened:
            mapped.close_peers()
            # nobody frees memory that another still maps
            tell(host, b"")
    except BaseException:
        mapped.close_peers()
        mapped.free()
        raise
    if not opened:
        mapped.free()
        return None
    watch = Watch(mapped, signals, names, pids, timeout_s)
    transport = DeviceMemoryTransport(rank=rank, layout=layout, mapped=mapped, watch=watch, signals=signals, host=host)
    succeeded = False
    try:
        succeeded = _first_exchanges(transport, layout, device, min(timeout_s / 2, _PROBE_S))
    finally:
        if not succeeded:
            transport.close()
    return transport if succeeded else None


def _first_exchanges(transport: DeviceMemoryTransport, layout: Inbox, device: Device, timeout_s: float) -> bool:
    """Whether they have succeeded on all ranks. Raises StepAborted if a rank is gone."""
    succeeded = _try(lambda: _probe(transport, layout, device, timeout_s))
    if not succeeded:
        # the others need not wait for what will not come
        transport.give_up("a first exchange failed")
    if transport.agree(succeeded):
        return True
    transport.give_up("a first exchange of another worker failed")
    return False


def _try(function: Callable[[], R]) -> R | None:
    """None if the device refuses, which is logged: its workers exchange tokens in another way then."""
    try:
        return function()
    except (RuntimeError, StepAborted) as error:
        logger.warning("workers cannot share this GPU's memory: %s", error)
        return None


def _probe(transport: DeviceMemoryTransport, layout: Inbox, device: Device, timeout_s: float) -> bool:
    """Use all places of all inboxes, and one of them again. It runs on a stream of its own, since steps of another
    group may wait for one another on the present one.

    Raises DeviceError if something else arrives, or nothing in time, and StepAborted if a peer has found so.
    """
    deadline, num_bytes = time.monotonic() + timeout_s, min(layout.capacity, _PROBE_BYTES)
    with device.aside():
        for turn in range(_TURNS):
            own = torch.full((num_bytes,), _mark(transport.rank, turn), dtype=torch.uint8, device=transport.home)
            received = transport.all_to_all([[own]] * layout.size, [num_bytes] * layout.size)
            done = device.mark()
            while not done():
                transport.check()
                if time.monotonic() > deadline:
                    raise DeviceError(f"a first exchange has not ended within {timeout_s:g} s")
                time.sleep(0.001)
            for peer, raw in enumerate(received):
                if peer != transport.rank and not bool((raw == _mark(peer, turn)).all()):
                    raise DeviceError(f"a first exchange has brought wrong bytes from rank {peer}")
    return True


def _mark(rank: int, turn: int) -> int:
    return (rank * _TURNS + turn + 1) % 256
