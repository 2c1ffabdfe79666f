"""Experts on their way between two workers of one GPU: they never leave its memory.

The sender exports one piece of device memory with some places. It gathers a bundle of experts in a free place, and what
travels between the processes says where it lies (`Parcel`). The receiver maps the memory once, copies the bundle into
memory of its own, and writes the parcel's number behind the places: the place is free again. A receiver that dies
writes nothing, so a place is taken back after `LEASE_S`: by then the copy has failed, and a receiver that comes late
finds other experts, which the digests show.

What is launched here goes to torch's present stream. Whoever gathers or takes waits for that stream afterwards.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from elastic_moe.cluster.facts.transfers import BUNDLE_BYTES, bundles_at_once
from elastic_moe.cluster.messages.epochs import Parcel
from elastic_moe.model.shared_gpu.driver import DeviceError
from elastic_moe.model.shared_gpu.memory import Device

logger = logging.getLogger(__name__)

LEASE_S = 120.0
"""Twice as long as a copy may take (COPY_TIMEOUT_S in actors/liveness.py)."""
_ALIGNED, _WORD = 256, 8


class Outbox:
    """Of one sender. Any thread may call it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._address: int | None = None
        self._handle = b""
        self._places = 0
        self._place_bytes = 0
        self._number = 0
        self._lent: dict[int, tuple[int, float]] = {}
        """By place: the number of the parcel that lies there, and when the place was lent."""
        self._broken = False

    def lend(self, nbytes: int, now: float | None = None) -> tuple[Parcel, Tensor] | None:
        """A free place for so many bytes, and its memory [nbytes], into which the caller lets copies be made. None if
        there is no place, or none for so much."""
        now = time.monotonic() if now is None else now
        with self._lock:
            if self._broken:
                return None
            try:
                self._device.attach()
                if self._address is None:
                    self._make(max(nbytes, BUNDLE_BYTES))
                place = self._free_place(now)
            except DeviceError as error:
                # experts pass through the host's memory from now on
                self._broken = True
                logger.warning("experts cannot stay on this GPU on their way: %s", error)
                return None
            if place is None or nbytes > self._place_bytes:
                return None
            self._number += 1
            self._lent[place] = self._number, now
            at = place * self._place_bytes
            parcel = Parcel(
                handle=self._handle,
                offset=at,
                nbytes=nbytes,
                number=self._number,
                word=self._places * self._place_bytes + place * _WORD,
                size=self._size,
            )
            assert self._address is not None
            return parcel, self._device.view(self._address, self._size)[at : at + nbytes]

    @property
    def _size(self) -> int:
        return self._places * (self._place_bytes + _WORD)

    def _make(self, place_bytes: int) -> None:
        self._places = bundles_at_once(place_bytes)
        self._place_bytes = -(-place_bytes // _ALIGNED) * _ALIGNED
        address = self._device.allocate(self._size)
        try:
            self._handle = self._device.export(address)
        except DeviceError:
            self._device.free(address)
            raise
        self._address = address
        # each thread has a stream of its own, so this one waits
        self._words().zero_().tolist()

    def _words(self) -> Tensor:
        """[places] the numbers of the parcels that have been taken out."""
        assert self._address is not None
        whole = self._device.view(self._address, self._size)
        return whole[self._places * self._place_bytes :].view(torch.int64)

    def _free_place(self, now: float) -> int | None:
        free = [place for place in range(self._places) if place not in self._lent]
        if not free:
            taken = self._words().tolist()
            for place, (number, since) in list(self._lent.items()):
                if taken[place] == number or now - since > LEASE_S:
                    del self._lent[place]
                    free.append(place)
        return free[0] if free else None


class Arrivals:
    """What a receiver has mapped of the others' memory. Any thread may call it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._opened: dict[bytes, int] = {}
        self._users = 0
        self._closing = False

    @contextmanager
    def taken(self, parcel: Parcel) -> Iterator[Tensor]:
        """The parcel's bytes [nbytes], in memory of their own. Raises DeviceError where this GPU has no such memory.

        The block must end with a wait for the stream; then the sender may use the parcel's place again. Blocks at its
        own end until the sender can see that.
        """
        whole = self._begin(parcel)
        try:
            word = whole[parcel.word : parcel.word + _WORD].view(torch.int64)
            try:
                yield whole[parcel.offset : parcel.offset + parcel.nbytes].clone()
                word.fill_(parcel.number)
            finally:
                # `_end` may unmap the memory that what was launched above reads and writes: waits for it
                word.tolist()
        finally:
            self._end()

    def close(self) -> None:
        """Unmap everything, as soon as nothing is being taken: memory of a worker that is gone is freed by that."""
        with self._lock:
            self._closing = True
            self._close_unused()

    def _begin(self, parcel: Parcel) -> Tensor:
        with self._lock:
            self._device.attach()
            if parcel.handle not in self._opened:
                self._opened[parcel.handle] = self._device.open(parcel.handle)
            whole = self._device.view(self._opened[parcel.handle], parcel.size)
            self._users += 1
            return whole

    def _end(self) -> None:
        with self._lock:
            self._users -= 1
            self._close_unused()

    def _close_unused(self) -> None:
        # a copy from memory that is unmapped would end this process's use of the GPU
        if not self._closing or self._users:
            return
        self._closing = False
        self._device.attach()
        while self._opened:
            self._device.close(self._opened.popitem()[1])
