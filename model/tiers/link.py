"""The way from the host's memory into a GPU's: pinned memory, a stream for copies, and events. Nobody waits on the CPU.

A copy into a slot begins when the products that read the slot before have been computed, and the products that read it
afterwards begin when the copy is done. The device sees to both, by events. On other devices than CUDA a copy is done at
once; so the code around it runs without a GPU, in tests.
"""

from __future__ import annotations

import logging
import mmap
from collections import deque
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from elastic_moe.model.staging import passed, recorded
from elastic_moe.model.tiers.slots import Slot

log = logging.getLogger(__name__)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class PinnedSlot(Slot):
    """A piece of pinned memory, from which experts are copied."""

    __slots__ = ("copied", "pinned")

    def __init__(self, pinned: Pinned, data: Tensor) -> None:
        self._release = lambda: None
        self.pinned = pinned
        """The memory that it is cut from, which lives as long as the slot."""
        self.data = data
        self.copied: torch.cuda.Event | None = None
        """When the last copy from it is done."""

    def wait(self) -> None:
        """Wait until it may be written. Blocks on the copy stream: the thread of the steps must not call it."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None


class DeviceSlot(Slot):
    """A piece of a device's memory, in which an expert is computed."""

    __slots__ = ("free", "full")

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._release = lambda: None
        with torch.inference_mode(False):
            self.data = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.free: torch.cuda.Event | None = None
        """When all products that read it are computed."""
        self.full: torch.cuda.Event | None = None
        """When the last copy into it is done."""


class Pinned:
    """Memory that a GPU copies from by itself. It begins at a page, so that direct reads can go straight to it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Raises RuntimeError if the driver does not pin it."""
        self._registered = False
        self._bytes = mmap.mmap(-1, nbytes)
        with suppress(OSError):  # this kernel has no huge pages
            self._bytes.madvise(mmap.MADV_HUGEPAGE)
        self.data = torch.frombuffer(self._bytes, dtype=torch.uint8)
        if device.type == "cuda":
            # torch's own pinned memory is rounded up to a power of two
            torch.cuda.check_error(_cudart().cudaHostRegister(self.data.data_ptr(), nbytes, 0))
            self._registered = True

    def __del__(self) -> None:
        if self._registered:
            _cudart().cudaHostUnregister(self.data.data_ptr())

    @classmethod
    def or_plain(cls, nbytes: int, device: torch.device) -> Pinned:
        """Memory that is pinned if the driver does so. Copies from other memory are slower, and right."""
        try:
            return cls(nbytes, device)
        except RuntimeError as error:
            log.warning("experts pass through memory that is not pinned: %s", error)
            return cls(nbytes, torch.device("cpu"))

    def slots(self, slot_bytes: int) -> list[PinnedSlot]:
        """As many as fit, the first ones last."""
        count = len(self.data) // slot_bytes
        return [PinnedSlot(self, self.data[n * slot_bytes : (n + 1) * slot_bytes]) for n in reversed(range(count))]


class Link:
    """Copies to one device. Any thread may call `copy`; the thread of the steps calls the rest."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stall_s = 0.0

    def slot(self, nbytes: int) -> DeviceSlot:
        slot = DeviceSlot(nbytes, self._device)
        # its memory may have been something else's, which products that were launched may still read
        self.release(slot)
        return slot

    def copy(self, source: PinnedSlot, slot: DeviceSlot) -> None:
        """Launch a copy. The source must not be written before `source.wait()`."""
        if self._stream is None:
            slot.data.copy_(source.data)
            return
        with torch.cuda.stream(self._stream):
            if slot.free is not None:
                self._stream.wait_event(slot.free)
            slot.data.copy_(source.data, non_blocking=True)
            slot.full = source.copied = recorded(self._stream)

    def arrived(self, slot: DeviceSlot) -> bool:
        return passed(slot.full)

    def use(self, slot: DeviceSlot) -> None:
        """Let products that are launched from now on wait until the slot is full. Only the device waits."""
        if slot.full is None or passed(slot.full):
            return
        before = recorded(timed=True)
        torch.cuda.current_stream(self._device).wait_event(slot.full)
        self._waits.append((before, recorded(timed=True)))

    def release(self, slot: DeviceSlot) -> None:
        """No product that is launched from now on reads the slot."""
        if self._stream is not None:
            slot.free = recorded()

    def stall_s(self) -> float:
        """Seconds for which the device has waited for copies, as far as it has got."""
        while self._waits and passed(self._waits[0][1]):
            before, after = self._waits.popleft()
            self._stall_s += before.elapsed_time(after) / 1000
        return self._stall_s
