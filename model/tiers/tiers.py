"""The tiers of one worker: its experts that are not always in memory, and how they come.

It is made when an epoch first places an expert of this worker on the disk. From then on the layers call it in steps
that need an expert which is not in memory.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from elastic_moe.cluster.messages.epochs import FetchSource, StallCause, TierCounts
from elastic_moe.cluster.placement import Tier
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.model.experts.interface import SlottedExperts, Tensors
from elastic_moe.model.experts.tiered_stacks import TieredStacks
from elastic_moe.model.tiers.area import Area, difference
from elastic_moe.model.tiers.disk import Disk, checkpoint_digest
from elastic_moe.model.tiers.far import FarWay
from elastic_moe.model.tiers.rates import HostRates
from elastic_moe.model.tiers.readers import Arrival
from elastic_moe.model.tiers.slots import Slot
from elastic_moe.model.tiers.way import NearWay, Way
from elastic_moe.optimizer.buffering.policies import make_policy

_LATEST = 15
"""Reads by which the disk is judged."""


class Tiers:
    """See the module. `place`, `fit_area` and `settle` are called between steps; any thread may call the rest."""

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
        device: torch.device,
        host_capacity: int = 0,
        rates: HostRates | None = None,
    ) -> None:
        """`load(layer, expert)` reads an expert from the checkpoint into the host's memory. `capacity` is the number of
        experts of all layers that may be in the device, and `host_capacity` that of those in pinned memory beside it.
        Reads one expert of each layer, to know its layout.
        """
        self._layers = layers
        self._capacity = capacity
        self._num_experts = checkpoint.info.num_logical_experts
        layouts = [layer.layout(self._any_expert(number, load)) for number, layer in enumerate(layers)]
        self._slot_bytes = max(layout.nbytes for layout in layouts)
        self._disk = Disk(directory, checkpoint_digest(checkpoint, dtype), layers, layouts, load)
        self._device = device
        stacks = [layer for layer in layers if isinstance(layer, TieredStacks)]
        self.way: Way
        """How experts come into the cache area."""
        if stacks:
            more = {"device": device, "host_capacity": host_capacity, "rates": rates}
            self.way = FarWay(self._disk, stacks, slot_bytes=self._slot_bytes, **more)  # type: ignore[arg-type]
        else:
            self.way = NearWay(self._disk, self._slot_bytes)
        self._area = Area(
            self,
            layers=len(layers),
            num_experts=self._num_experts,
            policy=lambda: make_policy(policy, self._num_experts),
            slot_bytes=self._slot_bytes,
        )
        self._placed: Sequence[Collection[int]] = [() for _ in layers]
        self._dealt: Sequence[Collection[int]] = self._placed
        self._read_s: deque[float] = deque(maxlen=_LATEST)
        """Seconds that the latest reads of records have taken."""
        self._counted = TierCounts()
        self._counting = threading.Lock()
        self.held_changed = False
        """Whether experts have come or gone beside the area since it got its size. Any thread may set it."""
        for number, layer in enumerate(layers):
            layer.supply(number, self._supplier(number))

    def _any_expert(self, number: int, load: Callable[[int, int], Tensors]) -> Tensors:
        held = self._layers[number].held()
        return self._layers[number].get(min(held)) if held else load(number, 0)

    def _supplier(self, number: int) -> Callable[[list[int], list[int] | None], list[int]]:
        def next_ready(experts: list[int], tokens: list[int] | None) -> list[int]:
            if tokens is not None:
                self.fit_area()
                # the steps before this one come first in the order of what was used
                self._area.note(number, self._layers[number].take_steps())
            return self._area.next(number, experts, tokens)

        return next_ready

    # --- Between steps ----------------------------------------------------------------------------------------------

    def place(
        self,
        placed: Sequence[Collection[int]],
        hosted: Sequence[Collection[int]],
        dealt: Sequence[Collection[int]] | None = None,
    ) -> None:
        """An epoch begins in which this worker serves the experts `placed` [L], in whichever tier they lie, of which
        `hosted` [L] lie in the host's memory beside a GPU. Steps may need the experts `dealt` [L] here as well.
        """
        self._placed = placed
        self._dealt = [() for _ in self._layers] if dealt is None else dealt
        for layer, experts in zip(self._layers, placed, strict=True):
            layer.serve(experts)
        self.way.place(hosted)
        self._resize()

    def fit_area(self) -> None:
        """Give the area the size that experts leave it which have come beside it. No step may run."""
        if self.held_changed:
            self._resize()

    def _resize(self) -> None:
        self.held_changed = False
        held = [layer.held() for layer in self._layers]
        own = [set(placed) - there for placed, there in zip(self._placed, held, strict=True)]
        wanted = [len(mine | (set(dealt) - there)) for mine, dealt, there in zip(own, self._dealt, held, strict=True)]
        # experts that are dealt pass through any slot
        least = max(sum(map(bool, own)), int(any(wanted)))
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
        self.way.close()

    # --- Told ---------------------------------------------------------------------------------------------------------

    def counts(self) -> TierCounts:
        """What was counted since the last call."""
        with self._counting:
            now = self._area.counts(sum(len(layer.held()) for layer in self._layers))
            misses_s = now.stall_s[StallCause.MISS] + self.way.stall_s()
            now = replace(now, stall_s={**now.stall_s, StallCause.MISS: misses_s})
            before, self._counted = self._counted, now
        return difference(now, before)

    @property
    def fetch_s(self) -> float:
        """Seconds in which an expert comes from the disk; 0 while that is not known."""
        return statistics.mean(self._read_s) if len(self._read_s) == _LATEST else 0.0

    def cached(self, layer: int) -> frozenset[int]:
        """Experts in the cache area. The thread that runs the steps calls it."""
        return self._area.cached(layer)

    def serves(self, layer: int, expert: int) -> bool:
        """Whether the epoch in force places this expert here, in whichever tier."""
        return expert in self._placed[layer]

    def read(self, layer: int, expert: int) -> Tensors:
        """An expert's tensors, from its record or from the checkpoint. Blocks on the disk."""
        slot = Slot(self._slot_bytes)
        self._disk.read(layer, expert, slot)
        return {name: tensor.to(self._device) for name, tensor in self._layers[layer].read(slot.data).items()}

    # --- What the area does with memory (Memory in area.py) -----------------------------------------------------------

    def held(self, layer: int) -> Collection[int]:
        return self._layers[layer].held()

    def slot(self) -> Slot:
        return self.way.slot()

    def tier(self, layer: int, expert: int) -> Tier:
        return self.way.tier(layer, expert)

    def aside(self, layer: int, tokens: Mapping[int, int]) -> list[int]:
        return self.way.aside(layer, tokens)

    def bind(self, layer: int, expert: int, slot: Slot) -> None:
        self.way.use(slot)
        self._layers[layer].bind(expert, slot.data)

    def unbind(self, layer: int, expert: int, slot: Slot) -> None:
        self._layers[layer].unbind(expert)
        self.way.release(slot)

    def fetch(self, layer: int, expert: int, slot: Slot, *, urgent: bool) -> None:
        self.way.fetch(layer, expert, slot, urgent=urgent)

    def arrival(self, *, wait: bool) -> Arrival | None:
        arrival = self.way.arrival(wait=wait)
        if arrival is not None and arrival.source is FetchSource.DISK:
            self._read_s.append(arrival.read_s)
        return arrival
