"""All-to-all between processes that share a GPU: each writes into the memory of the others, and the GPU waits.

Every rank exports one piece of device memory, its inbox: two places for each peer, which are used in turn. An exchange
is launched on the stream and not waited for by the CPU. The stream copies a message into the peer's inbox, then writes
the number of the exchange into a word of the peer (device_signals.py), then waits until the words of this rank have the
number. Two places suffice: a stream writes exchange n+2 after the wait of exchange n+1, and a peer's stream writes its
number n+1 after the products that have read exchange n.

The words lie in the host's memory. So the CPU can end the stream's waits when a peer is gone, and no kernel ever spins.
A thread watches for that. Whoever aborts tells the others first, since what its stream does next has no meaning.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import psutil
import torch
from torch import Tensor

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.model.cuda_driver import DeviceError
from elastic_moe.model.exchange.device_signals import (
    Signals,
    Silence,
    arrival_offset,
    following,
    segment_bytes,
)
from elastic_moe.model.exchange.shared_memory import SharedMemoryTransport
from elastic_moe.model.native import segments

logger = logging.getLogger(__name__)

_ALIGNED = 256
"""Bytes to which a message is aligned."""
_LOOK_S = 0.02
"""Seconds between two looks of the thread that watches."""
_TURNS, _PROBE_BYTES, _PROBE_S = 3, 1 << 16, 20.0
"""Exchanges that a new group makes to see that it works, their bytes, and the seconds that they may take."""
_SPINS, _YIELDS, _DOZE_S = 200, 20_000, 0.0001
"""Looks at a word before a CPU that waits yields its core, and before it sleeps, for how many seconds."""
_LARGEST_CARD = 64
"""Bytes of what ranks tell each other over the host when they join: a handle of the driver."""

R = TypeVar("R")


class Device(Protocol):
    """What the exchange needs of a GPU. model/cuda_driver.py has it, and says what each method does."""

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


class _Mapped:
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


class _Watch:
    """Ends the waits of a group that has failed, and frees its memory when nobody uses it any more."""

    def __init__(
        self, mapped: _Mapped, signals: Signals, names: Sequence[str], pids: Sequence[int], timeout_s: float
    ) -> None:
        self.launched = 0
        """The number of the last exchange."""
        self.failure: str | None = None
        self._mapped = mapped
        self._signals = signals
        self._names = names
        self._pids = pids
        self._timeout_s = timeout_s
        self._done: Callable[[], bool] | None = None
        """Set when the transport is closed: whether the stream has done all exchanges."""
        self._failing = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="device-exchange", daemon=True).start()

    def fail(self, reason: str) -> None:
        """Abort the group, on this rank and on the others."""
        with self._failing:
            if self.failure is None:
                self._signals.tell_aborted()
                self.failure = reason
        self._signals.release(self.launched)

    def check(self) -> None:
        """Raises StepAborted if this rank or another has aborted."""
        if self.failure is None:
            aborted = self._signals.aborted_peers()
            if aborted:
                self.fail(f"{self._say(aborted)} has aborted the exchange")
        if self.failure is not None:
            raise StepAborted(self.failure)

    def close(self, done: Callable[[], bool]) -> None:
        """Free everything when the stream has `done` all exchanges."""
        self._done = self._done or done

    def wait_end(self, timeout_s: float) -> bool:
        """Wait until all is freed, for tests."""
        return self._ended.wait(timeout_s)

    def _run(self) -> None:
        silence = Silence(time.monotonic())
        try:
            self._mapped.device.attach()
            while not self._look(silence):
                time.sleep(_LOOK_S)
            self._ended.set()
        except RuntimeError as error:
            # the device has failed as a whole: the steps fail too, and only the process's end frees its memory
            self.fail(f"the device has failed: {error}")
            logger.warning("the exchange of a shared GPU has ended: %s", error)

    def _look(self, silence: Silence) -> bool:
        """Returns whether everything is freed."""
        if self.failure is None:
            aborted = self._signals.aborted_peers()
            silent_s = silence.lasts_s(self.launched, self._signals.arrived(), time.monotonic())
            if aborted:
                self.fail(f"{self._say(aborted)} has aborted the exchange")
            elif silent_s > self._timeout_s:
                late = [
                    peer
                    for peer in range(len(self._names))
                    if peer in self._mapped.peers and not self._signals.has_arrived(peer, self.launched)
                ]
                self.fail(f"{self._say(late)} has not answered for {self._timeout_s:g} s")
        else:
            self._signals.release(self.launched)
        return self._done is not None and self._done() and self._free()

    def _free(self) -> bool:
        if self._mapped.peers:
            self._mapped.close_peers()
            self._signals.tell_closed()
        if any(_lives(self._pids[peer]) for peer in self._signals.open_peers()):
            return False
        self._mapped.free()
        return True

    def _say(self, peers: Sequence[int]) -> str:
        return ", ".join(self._names[peer] for peer in peers)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class DeviceMemoryTransport:
    """See the module. `join_on_device` makes it."""

    def __init__(
        self, *, rank: int, layout: Inbox, mapped: _Mapped, watch: _Watch, signals: Signals, host: SharedMemoryTransport
    ) -> None:
        """host: carries sizes that a receiver does not know."""
        self.rank = rank
        self.size = layout.size
        self.host_waits = False
        """The CPU waits for the words, and not the stream. All ranks may choose freely."""
        self._layout = layout
        self._device = mapped.device
        self._mapped = mapped
        self._watch = watch
        self._signals = signals
        self._host = host
        assert mapped.own is not None
        self._inbox = self._device.view(mapped.own, layout.num_bytes)
        self._nothing = self._inbox[:0]
        self.home = self._inbox.device
        # whoever drops the transport without a word closes it too
        weakref.finalize(self, _close, watch, mapped.device).atexit = False

    def all_to_all(self, send: Sequence[Sequence[Tensor]], recv_bytes: Sequence[int] | None) -> list[Tensor]:
        self.check()
        sizes = self._sizes(send) if recv_bytes is None else [int(n) for n in recv_bytes]
        number = following(self._watch.launched)
        self._device.follow()
        for peer in self._mapped.peers:
            self._send(peer, send[peer], number)
        # before the waits, so that an abort ends them
        self._watch.launched = number
        for peer in self._mapped.peers:
            self._await(peer, number)
        return [self._received(peer, sizes[peer], number) for peer in range(self.size)]

    def check(self) -> None:
        self._watch.check()

    def abort(self) -> None:
        self.give_up("the exchange was aborted")
        self._host.abort()

    def give_up(self, reason: str) -> None:
        """End all waits on this rank and on the others. `check` raises StepAborted with the reason."""
        self._watch.fail(reason)

    def agree(self, said: bool | None) -> bool:
        """Whether all ranks say so. Blocks."""
        return _agree(self._host, said)

    def close(self) -> None:
        """Free the memory as soon as no rank uses it. Does not block."""
        _close(self._watch, self._device)
        self._host.close()

    def wait_freed(self, timeout_s: float) -> bool:
        """Wait until the memory is free after `close`. Returns whether it is."""
        return self._watch.wait_end(timeout_s)

    def _sizes(self, send: Sequence[Sequence[Tensor]]) -> list[int]:
        mine = [[torch.tensor([sum(t.nbytes for t in tensors)])] for tensors in send]
        said = self._host.all_to_all(mine, None)
        return [int(raw.view(torch.int64).item()) if raw.numel() else 0 for raw in said]

    def _send(self, peer: int, tensors: Sequence[Tensor], number: int) -> None:
        at = self._layout.offset(number, source=self.rank, owner=peer)
        end = at + self._layout.capacity
        for tensor in tensors:
            if tensor.numel():
                assert at + tensor.nbytes <= end, "a message is larger than the group was made for"
                self._device.copy(self._mapped.peers[peer] + at, tensor.contiguous())
                at += tensor.nbytes
        self._device.write(self._mapped.words[peer] + arrival_offset(self.rank), number)

    def _await(self, peer: int, number: int) -> None:
        if not self.host_waits:
            self._device.wait(self._mapped.words[self.rank] + arrival_offset(peer), number)
            return
        looks = 0
        while not self._signals.has_arrived(peer, number):
            looks += 1
            if looks > _SPINS:
                self.check()
                time.sleep(_DOZE_S if looks > _YIELDS else 0)

    def _received(self, peer: int, num_bytes: int, number: int) -> Tensor:
        if peer == self.rank:
            return self._nothing
        at = self._layout.offset(number, source=peer, owner=self.rank)
        return self._inbox[at : at + num_bytes]


# --- Joining ------------------------------------------------------------------------------------------------------


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
        _tell(host, b"")

    segments.join(f"{group}-words", rank, size, segment_bytes(size), timeout_s, meet)
    layout, mapped, signals = inbox(size, max_bytes), _Mapped(device, rank, memories), Signals(memories, rank)
    try:
        pids = [int.from_bytes(raw, "little") for raw in _tell(host, os.getpid().to_bytes(8, "little"))]
        handles = _tell(host, _try(lambda: mapped.make(layout.num_bytes)) or b"")
        opened = _agree(host, all(handles) and _try(lambda: mapped.open(handles)))
        if not opened:
            mapped.close_peers()
            # nobody frees memory that another still maps
            _tell(host, b"")
    except BaseException:
        mapped.close_peers()
        mapped.free()
        raise
    if not opened:
        mapped.free()
        return None
    watch = _Watch(mapped, signals, names, pids, timeout_s)
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


def _close(watch: _Watch, device: Device) -> None:
    watch.close(device.mark())


def _agree(host: SharedMemoryTransport, said: bool | None) -> bool:
    return all(_tell(host, b"yes" if said else b""))


def _tell(host: SharedMemoryTransport, said: bytes) -> list[bytes]:
    """Tell all ranks. Returns what each has said."""
    tensor = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else torch.empty(0, dtype=torch.uint8)
    heard = host.all_to_all([[tensor]] * host.size, None)
    return [said if rank == host.rank else raw.numpy().tobytes() for rank, raw in enumerate(heard)]


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
