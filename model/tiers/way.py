"""How experts come into the slots of the cache area: straight from the disk if it lies in the host's memory.

model/tiers/far.py is the way into a GPU's memory.
"""

from __future__ import annotations

import queue
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from elastic_moe.cluster.placement import Tier
from elastic_moe.model.tiers.disk import Disk
from elastic_moe.model.tiers.readers import Arrival, Readers
from elastic_moe.model.tiers.slots import Slot


class Way(Protocol):
    """Makes slots, and brings experts into them. The thread that runs the steps calls it."""

    def slot(self) -> Slot: ...

    def place(self, hosted: Sequence[Collection[int]]) -> None:
        """An epoch begins that places the experts `hosted` [L] in the host's memory beside a GPU."""
        ...

    def tier(self, layer: int, expert: int) -> Tier:
        """Where an expert lies that is not in the device."""
        ...

    def aside(self, layer: int, tokens: Mapping[int, int]) -> list[int]:
        """Those of the missing experts that are computed where they lie beside the device. `tokens`: rows of each, most
        first."""
        ...

    def fetch(self, layer: int, expert: int, slot: Slot, *, urgent: bool) -> None:
        """Begin to bring an expert into a slot."""
        ...

    def arrival(self, *, wait: bool) -> Arrival | None:
        """The next expert that has arrived. `wait`: where none has, the next whose products may be launched."""
        ...

    def use(self, slot: Slot) -> None:
        """Products that are launched from now on read the slot."""
        ...

    def release(self, slot: Slot) -> None:
        """No product that is launched from now on reads the slot."""
        ...

    def stall_s(self) -> float:
        """Seconds for which the device has waited by itself."""
        ...

    def close(self) -> None: ...


class NearWay:
    """A Way into the host's memory."""

    def __init__(self, disk: Disk, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._readers = Readers(disk.read)

    def slot(self) -> Slot:
        return Slot(self._slot_bytes)

    def place(self, hosted: Sequence[Collection[int]]) -> None: ...

    def tier(self, layer: int, expert: int) -> Tier:
        return Tier.DISK

    def aside(self, layer: int, tokens: Mapping[int, int]) -> list[int]:
        return []

    def fetch(self, layer: int, expert: int, slot: Slot, *, urgent: bool) -> None:
        self._readers.submit(layer, expert, slot, urgent=urgent)

    def arrival(self, *, wait: bool) -> Arrival | None:
        try:
            return self._readers.arrivals.get(block=wait)
        except queue.Empty:
            return None

    def use(self, slot: Slot) -> None: ...

    def release(self, slot: Slot) -> None: ...

    def stall_s(self) -> float:
        return 0.0

    def close(self) -> None:
        self._readers.close()
