"""How experts come into the slots of a GPU: from pinned memory at once, or through it from the disk.

The thread of the steps waits for the disk alone. It launches the copy of an expert that lies in the host's memory, and
goes on. A reader reads a record into pinned memory of its own, launches the copy, and then tells that the expert has
arrived. Whoever needs pinned memory again waits for its last copy: a reader or the host tier's thread.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence

import torch

from elastic_moe.cluster.messages.epochs import FetchSource
from elastic_moe.cluster.placement import Tier
from elastic_moe.model.experts.tiered_stacks import TieredStacks
from elastic_moe.model.tiers.disk import Disk
from elastic_moe.model.tiers.host import HostTier, computed_by_host
from elastic_moe.model.tiers.link import DeviceSlot, Link, Pinned, PinnedSlot
from elastic_moe.model.tiers.rates import HostRates
from elastic_moe.model.tiers.readers import Arrival, Readers
from elastic_moe.model.tiers.slots import Slot


class FarWay:
    """A Way into a device's memory."""

    def __init__(
        self,
        disk: Disk,
        layers: Sequence[TieredStacks],
        *,
        device: torch.device,
        slot_bytes: int,
        host_capacity: int,
        rates: HostRates | None,
    ) -> None:
        """host_capacity: experts of all layers for which there is pinned memory. rates: None where there is none."""
        self._disk = disk
        self._layers = layers
        self._device = device
        self._slot_bytes = slot_bytes
        self._rates = rates
        self._link = Link(device)
        self._host = HostTier(capacity=host_capacity, slot_bytes=slot_bytes, device=device, read=disk.read)
        self._readers = Readers(self._read)
        self._own = threading.local()
        self._launched: deque[Arrival] = deque()
        """Arrivals whose copies may not be done."""
        for layer in layers:
            layer.borrows = host_capacity > 0 and rates is not None

    def _read(self, layer: int, expert: int, slot: Slot) -> FetchSource:
        """Read an expert from the disk into a slot of the device. The copy is launched, and may not be done."""
        assert isinstance(slot, DeviceSlot)
        passing: PinnedSlot | None = getattr(self._own, "slot", None)
        if passing is None:
            [passing] = Pinned.or_plain(self._slot_bytes, self._device).slots(self._slot_bytes)
            self._own.slot = passing
        passing.wait()
        source = self._disk.read(layer, expert, passing)
        self._link.copy(passing, slot)
        return source

    def slot(self) -> Slot:
        return self._link.slot(self._slot_bytes)

    def place(self, hosted: Sequence[Collection[int]]) -> None:
        for layer in self._layers:
            # what is lent may leave the host tier
            layer.lend({})
        self._host.place(hosted)

    @property
    def host(self) -> HostTier:
        return self._host

    def tier(self, layer: int, expert: int) -> Tier:
        return Tier.HOST if self._host.has(layer, expert) else Tier.DISK

    def aside(self, layer: int, tokens: Mapping[int, int]) -> list[int]:
        stacks, chosen = self._layers[layer], {}
        if stacks.can_borrow and self._rates is not None:
            near = {expert: rows for expert, rows in tokens.items() if self._host.has(layer, expert)}
            fetch_s = self._slot_bytes / self._rates.bytes_per_s
            count = computed_by_host(list(near.values()), fetch_s, self._rates.token_s)
            for expert in list(near)[len(near) - count :]:
                if (pinned := self._host.get(layer, expert)) is not None:
                    chosen[expert] = pinned.data
        stacks.lend(chosen)
        return list(chosen)

    def fetch(self, layer: int, expert: int, slot: Slot, *, urgent: bool) -> None:
        assert isinstance(slot, DeviceSlot)
        pinned = self._host.get(layer, expert)
        if pinned is None:
            self._readers.submit(layer, expert, slot, urgent=urgent)
            return
        self._link.copy(pinned, slot)
        self._launched.append(Arrival(layer=layer, expert=expert, slot=slot, source=FetchSource.HOST))

    def arrival(self, *, wait: bool) -> Arrival | None:
        try:
            while True:
                self._launched.append(self._readers.arrivals.get(block=wait and not self._launched))
        except queue.Empty:
            pass
        for number, one in enumerate(self._launched):
            assert isinstance(one.slot, DeviceSlot)
            if wait or one.error is not None or self._link.arrived(one.slot):
                del self._launched[number]
                return one
        return None

    def use(self, slot: Slot) -> None:
        assert isinstance(slot, DeviceSlot)
        self._link.use(slot)

    def release(self, slot: Slot) -> None:
        assert isinstance(slot, DeviceSlot)
        self._link.release(slot)

    def stall_s(self) -> float:
        return self._link.stall_s()

    def close(self) -> None:
        self._readers.close()
        self._host.close()
