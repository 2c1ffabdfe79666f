"""The tiers of one worker: its experts that are not always in memory, and how they come.

It is made when an epoch first places an expert of this worker on the disk. From then on the layers call it in steps
that need an expert which is not in memory.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from elastic_moe.cluster.messages.epochs import TierCounts
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.model.experts.interface import SlottedExperts, Tensors
from elastic_moe.model.tiers.area import Area, difference
from elastic_moe.model.tiers.disk import Disk, checkpoint_digest
from elastic_moe.model.tiers.readers import Arrival, Readers
from elastic_moe.model.tiers.slots import Slot
from elastic_moe.optimizer.buffering.policies import make_policy


class Tiers:
    """See the module. The thread that runs the steps calls `place` and `settle`; any thread may call the rest."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[SlottedExperts],
        load: Callable[[int, int], Tensors],
        *,
        dtype: str,
        directory: Path,
        policy: str,
        capacity: int,
    ) -> None:
        """`load(layer, expert)` reads an expert from the checkpoint. `capacity` is the number of experts of all layers
        that may be in memory. Reads one expert of each layer, to know its layout.
        """
        self._layers = layers
        self._capacity = capacity
        self._num_experts = checkpoint.info.num_logical_experts
        layouts = [layer.layout(self._any_expert(number, load)) for number, layer in enumerate(layers)]
        self._slot_bytes = max(layout.nbytes for layout in layouts)
        self._disk = Disk(directory, checkpoint_digest(checkpoint, dtype), layers, layouts, load)
        self._readers = Readers(self._disk.read)
        self._area = Area(
            self,
            layers=len(layers),
            num_experts=self._num_experts,
            policy=lambda: make_policy(policy, self._num_experts),
            slot_bytes=self._slot_bytes,
        )
        self._placed: Sequence[Collection[int]] = [() for _ in layers]
        self._counted = TierCounts()
        self._counting = threading.Lock()
        self._held_changed = False
        for number, layer in enumerate(layers):
            layer.supply(number, self._supplier(number))

    def _any_expert(self, number: int, load: Callable[[int, int], Tensors]) -> Tensors:
        held = self._layers[number].held()
        return self._layers[number].get(min(held)) if held else load(number, 0)

    def _supplier(self, number: int) -> Callable[[list[int], list[int] | None], list[int]]:
        def next_ready(experts: list[int], tokens: list[int] | None) -> list[int]:
            if tokens is not None:
                if self._held_changed:
                    self._resize()
                # the steps before this one come first in the order of what was used
                self._area.note(number, self._layers[number].take_steps())
            return self._area.next(number, experts, tokens)

        return next_ready

    # --- Between steps ----------------------------------------------------------------------------------------------

    def place(self, placed: Sequence[Collection[int]]) -> None:
        """An epoch begins in which this worker serves the experts `placed` [L], in whichever tier they lie."""
        self._placed = placed
        self._resize()

    def held_changed(self) -> None:
        """Another expert is held beside the area, or one fewer. The area is made smaller or larger at the next step."""
        self._held_changed = True

    def _resize(self) -> None:
        self._held_changed = False
        held = [layer.held() for layer in self._layers]
        wanted = [len(set(placed) - there) for placed, there in zip(self._placed, held, strict=True)]
        least = sum(count > 0 for count in wanted)
        room = self._capacity - sum(map(len, held))
        self._area.resize(min(max(least, room), sum(wanted)), wanted)
        for number in range(len(self._layers)):
            self._area.forget_held(number)

    def settle(self) -> None:
        """Note what the last step used. Call it after every step."""
        for number, layer in enumerate(self._layers):
            if steps := layer.take_steps():
                self._area.note(number, steps)

    def take_error(self) -> BaseException | None:
        """Why the last step could not get an expert; None if that is not why it failed."""
        errors = [error for layer in self._layers if (error := layer.take_error()) is not None]
        return errors[0] if errors else None

    def close(self) -> None:
        self._readers.close()

    # --- Told ---------------------------------------------------------------------------------------------------------

    def counts(self) -> TierCounts:
        """What was counted since the last call."""
        with self._counting:
            now = self._area.counts(sum(len(layer.held()) for layer in self._layers))
            before, self._counted = self._counted, now
        return difference(now, before)

    def serves(self, layer: int, expert: int) -> bool:
        """Whether the epoch in force places this expert here, in whichever tier."""
        return expert in self._placed[layer]

    def read(self, layer: int, expert: int) -> Tensors:
        """An expert's tensors, from its record or from the checkpoint. Blocks on the disk."""
        slot = Slot(self._slot_bytes)
        self._disk.read(layer, expert, slot)
        return self._layers[layer].read(slot.data)

    # --- What the area does with memory (Memory in area.py) -----------------------------------------------------------

    def held(self, layer: int) -> Collection[int]:
        return self._layers[layer].held()

    def bind(self, layer: int, expert: int, slot: Slot) -> None:
        self._layers[layer].bind(expert, slot.data)

    def unbind(self, layer: int, expert: int) -> None:
        self._layers[layer].unbind(expert)

    def fetch(self, layer: int, expert: int, slot: Slot, *, urgent: bool) -> None:
        self._readers.submit(layer, expert, slot, urgent=urgent)

    def arrival(self, *, wait: bool) -> Arrival | None:
        try:
            return self._readers.arrivals.get(block=wait)
        except queue.Empty:
            return None
