"""All-to-all between processes that share a GPU: each writes into the memory of the others, and the GPU waits.

Every rank exports one piece of device memory, its inbox: two places for each peer, which are used in turn. An exchange
is launched on the stream and not waited for by the CPU. The stream copies a message into the peer's inbox, then writes
the number of the exchange into a word of the peer (signals.py), then waits until the words of this rank have the
number. Two places suffice: a stream writes exchange n+2 after the wait of exchange n+1, and a peer's stream writes its
number n+1 after the products that have read exchange n.

The words lie in the host's memory. So the CPU can end the stream's waits when a peer is gone, and no kernel ever spins.
A thread watches for that (watch.py). Whoever aborts tells the others first, since what its stream does next has no
meaning.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from elastic_moe.model.shared_gpu.memory import Device, Inbox, Mapped
from elastic_moe.model.shared_gpu.signals import Signals, arrival_offset, following
from elastic_moe.model.shared_gpu.watch import Watch

_SPINS, _YIELDS, _DOZE_S = 200, 20_000, 0.0001
"""Looks at a word before a CPU that waits yields its core, and before it sleeps, for how many seconds."""


class Host(Protocol):
    """Carries small messages between the ranks over the host's memory; SharedMemoryTransport does."""

    rank: int
    size: int

    def all_to_all(self, send: Sequence[Sequence[Tensor]], recv_bytes: Sequence[int] | None) -> list[Tensor]: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class DeviceMemoryTransport:
    """See the module. `join_on_device` in model/exchange/device_joining.py makes it."""

    launches = True

    def __init__(self, *, rank: int, layout: Inbox, mapped: Mapped, watch: Watch, signals: Signals, host: Host) -> None:
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

    @property
    def device(self) -> Device:
        """Another object for the same GPU, whose calls go to streams of their own."""
        return self._device.again()

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
        return agree(self._host, said)

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


def _close(watch: Watch, device: Device) -> None:
    watch.close(device.mark())


def agree(host: Host, said: bool | None) -> bool:
    """Whether all ranks say yes."""
    return all(tell(host, b"yes" if said else b""))


def tell(host: Host, said: bytes) -> list[bytes]:
    """Tell all ranks. Returns what each has said."""
    tensor = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else torch.empty(0, dtype=torch.uint8)
    heard = host.all_to_all([[tensor]] * host.size, None)
    return [said if rank == host.rank else raw.numpy().tobytes() for rank, raw in enumerate(heard)]
