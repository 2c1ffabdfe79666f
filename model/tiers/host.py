"""The host tier of one GPU worker: experts in pinned memory, and which of them the host's cores compute.

A thread fills it from the disk, in the background. An expert that is not there yet is read from the disk when a step
needs it, as if it lay there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence

import torch

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.model.tiers.link import Pinned, PinnedSlot
from elastic_moe.model.tiers.slots import Slot

log = logging.getLogger(__name__)

_CHUNK = 256 << 20
"""Bytes that are pinned at a time, which takes the driver some 0.1 s."""


def computed_by_host(tokens: Sequence[int], fetch_s: float, token_s: float) -> int:
    """How many experts, from the end of the list on, the host's cores compute while the others are fetched one after
    another, so that all are done soonest. `tokens`: rows of each expert, most first."""
    done_s, best, count = 0.0, len(tokens) * fetch_s, 0
    for number, rows in enumerate(reversed(tokens), start=1):
        done_s += rows * token_s
        both = max(done_s, (len(tokens) - number) * fetch_s)
        if both < best:
            best, count = both, number
    return count


class HostTier:
    """See the module. The thread of the steps calls `place` and `get`."""

    def __init__(
        self, *, capacity: int, slot_bytes: int, device: torch.device, read: Callable[[int, int, Slot], object]
    ) -> None:
        """capacity: experts over all layers. `read(layer, expert, slot)` reads one from the disk, in this thread."""
        self._capacity = capacity
        self._slot_bytes = slot_bytes
        self._device = device
        self._read = read
        self._made = 0
        self._free: list[PinnedSlot] = []
        self._experts: dict[tuple[int, int], PinnedSlot] = {}
        self._wanted: dict[tuple[int, int], None] = {}
        """In the order in which they are to be read."""
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def place(self, wanted: Sequence[Collection[int]]) -> None:
        """These experts [L] are to be in pinned memory from now on; others leave it."""
        with self._changed:
            pairs = [(layer, expert) for layer, row in enumerate(wanted) for expert in sorted(row)]
            self._wanted = dict.fromkeys(pairs[: self._capacity])
            for pair in self._experts.keys() - self._wanted.keys():
                self._free.append(self._experts.pop(pair))
            self._changed.notify_all()
        if self._wanted and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="host-experts", daemon=True)
            self._thread.start()

    def get(self, layer: int, expert: int) -> PinnedSlot | None:
        """The expert's memory, which stays what it is until the next `place`; None if it is not there."""
        with self._changed:
            return self._experts.get((layer, expert))

    def has(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._experts

    def close(self) -> None:
        """End the thread when it has read what it reads now."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def filled(self, timeout_s: float) -> bool:
        """Wait until everything that was placed is there. False if it is not after that time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._next() is None, timeout_s)

    def _next(self) -> tuple[int, int] | None:
        return next((pair for pair in self._wanted if pair not in self._experts), None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                if self._closed:
                    return
                pair = self._next()
                assert pair is not None
            slot = None
            try:
                slot = self._slot()
                slot.wait()
                self._read(*pair, slot)
            except (CheckpointError, OSError, RuntimeError) as error:
                log.warning("expert %d of layer %d stays on the disk: %s", pair[1], pair[0], error)
                self._ended(pair, slot, came=False)
            else:
                self._ended(pair, slot, came=True)

    def _ended(self, pair: tuple[int, int], slot: PinnedSlot | None, *, came: bool) -> None:
        with self._changed:
            # another epoch may have begun meanwhile
            if slot is not None and came and pair in self._wanted:
                self._experts[pair] = slot
            elif slot is not None:
                self._free.append(slot)
            if not came:
                self._wanted.pop(pair, None)
            self._changed.notify_all()

    def _slot(self) -> PinnedSlot:
        """Raises RuntimeError if no more memory can be pinned."""
        with self._changed:
            if self._free:
                return self._free.pop()
            count = min(self._capacity - self._made, max(1, _CHUNK // self._slot_bytes))
        made = Pinned(count * self._slot_bytes, self._device).slots(self._slot_bytes)
        with self._changed:
            self._made += count
            self._free += made
            return self._free.pop()
