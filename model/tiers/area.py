"""The cache area of one worker: which experts lie in its slots, which are on their way, and which leave.

All slots are alike, so any slot can take any expert of any layer. A layer keeps a share of them from step to step. A
few more are for what comes and goes within a step: they let the disk read ahead of the products.

In a step, the experts of the area that have tokens are computed first, since their slots are then free for others;
then those that are always in memory, while others are read; then those that the host's cores compute beside a GPU;
then those that arrive, in waves if they are many. An expert that the step still needs never leaves. At the end of a
layer its share is kept, and the policy chooses of what. If the policy values an expert more that was computed beside
the area, that one is brought in afterwards.

This class decides and counts; others read and copy (model/tiers/way.py). Whoever calls it keeps steps from running.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np

from elastic_moe.cluster.messages.epochs import FetchSource, StallCause, TierCounts
from elastic_moe.cluster.placement import Tier
from elastic_moe.model.tiers.readers import Arrival
from elastic_moe.model.tiers.slots import Slot
from elastic_moe.optimizer.buffering.interface import Policy

PASSING = 6
"""Slots that no layer keeps, if there are enough of them."""
_SURE = 0.75
"""Share of the latest steps in which an expert must have had tokens to be read before its layer begins."""
_NEWEST = 0.2
"""Weight of the newest step in that share."""


class Memory(Protocol):
    """What the area does to the experts of a layer. Layers are numbered."""

    def held(self, layer: int) -> Collection[int]:
        """Experts that are in memory beside the area."""
        ...

    def slot(self) -> Slot:
        """Memory for any expert."""
        ...

    def tier(self, layer: int, expert: int) -> Tier:
        """Where an expert lies that is not in memory."""
        ...

    def aside(self, layer: int, tokens: Mapping[int, int]) -> list[int]:
        """Those of the missing experts that can be computed at once where they lie, which is sooner than to fetch them.
        `tokens`: rows of each, most first."""
        ...

    def bind(self, layer: int, expert: int, slot: Slot) -> None:
        """Compute an expert from a slot."""
        ...

    def unbind(self, layer: int, expert: int, slot: Slot) -> None: ...

    def fetch(self, layer: int, expert: int, slot: Slot, *, urgent: bool) -> None:
        """Begin to read an expert into a slot. It arrives later."""
        ...

    def arrival(self, *, wait: bool) -> Arrival | None:
        """The next expert that has arrived; None if there is none now."""
        ...


class _Layer:
    def __init__(self, policy: Policy, num_experts: int) -> None:
        self.policy = policy
        self.cached: dict[int, Slot] = {}
        """In the order of their arrival."""
        self.coming: set[int] = set()
        self.share = 0
        self.activity_E = np.zeros(num_experts)

    def note(self, active: Sequence[int]) -> None:
        self.policy.note(active)
        self.activity_E *= 1 - _NEWEST
        self.activity_E[list(active)] += _NEWEST


class Area:
    """See the module."""

    READ_AHEAD = False
    """Whether experts that the next layer will surely need are read before it begins."""

    def __init__(
        self,
        memory: Memory,
        *,
        layers: int,
        num_experts: int,
        policy: Callable[[], Policy],
        slot_bytes: int,
        read_ahead: bool | None = None,
    ) -> None:
        """`policy` makes the policy of a layer. `read_ahead` takes the place of READ_AHEAD."""
        self._memory = memory
        self._layers = [_Layer(policy(), num_experts) for _ in range(layers)]
        self._slot_bytes = slot_bytes
        self.read_ahead = self.READ_AHEAD if read_ahead is None else read_ahead
        self._size = 0
        self._made = 0
        """Slots that exist; never more than `_size` once experts on their way have arrived."""
        self._free: list[Slot] = []
        self._layer = 0
        self._needed: set[int] = set()
        """Experts of the step's layer that have yet to be computed."""
        self._waiting: deque[int] = deque()
        """Those of them that are not in memory and not on their way, those with most tokens first."""
        self._open: set[int] = set()
        """Those of them that have not been handed out."""
        self._later: list[int] = []
        """Those that are always in memory: they are handed out after those of the area."""
        self._aside: list[int] = []
        """Those that are computed where they lie beside a GPU: they are handed out after these."""
        self._admissible: list[int] = []
        """The same, until the layer ends."""
        self._waves = False
        self._accesses = [0, 0, 0]
        self._bytes = dict.fromkeys(FetchSource, 0)
        self._stall_s = dict.fromkeys(StallCause, 0.0)

    # --- Size -----------------------------------------------------------------------------------------------------

    def resize(self, size: int, wanted: Sequence[int]) -> None:
        """Give the area `size` slots. `wanted` [L] is how many experts of each layer are not always in memory."""
        self._size = size
        total = max(1, sum(wanted))
        # where all fit, nothing needs to pass through
        kept = size if size >= total else size - max(1, min(PASSING, size // 2))
        ends = [kept * end // total for end in np.cumsum([0, *wanted])]
        for number, layer in enumerate(self._layers):
            layer.share = int(ends[number + 1] - ends[number])
            self._trim(number)
        while self._free and self._made > self._size:
            self._free.pop()
            self._made -= 1

    @property
    def size(self) -> int:
        return self._size

    def _release(self, slot: Slot) -> None:
        if self._made > self._size:
            self._made -= 1
        else:
            self._free.append(slot)

    def _trim(self, number: int) -> None:
        layer = self._layers[number]
        while len(layer.cached) > layer.share:
            self._evict(number, layer.policy.victim(list(layer.cached), ()))

    def _evict(self, number: int, expert: int) -> None:
        slot = self._layers[number].cached.pop(expert)
        self._memory.unbind(number, expert, slot)
        self._release(slot)

    def forget_held(self, number: int) -> None:
        """Let experts leave the area that are held beside it by now."""
        for expert in set(self._memory.held(number)) & set(self._layers[number].cached):
            self._evict(number, expert)

    # --- A layer of a step ----------------------------------------------------------------------------------------

    def next(self, number: int, experts: list[int], tokens: list[int] | None) -> list[int]:
        """See Next in model/experts/interface.py. Blocks on the disk; raises the error of a read that failed."""
        if tokens is not None:
            self._begin(number, experts, tokens)
        else:
            self._needed.difference_update(experts)
            self._start()
        return self._ready()

    def note(self, number: int, steps: Sequence[Sequence[int]]) -> None:
        """Note the active experts of steps in which all of them were in memory."""
        for active in steps:
            self._layers[number].note(active)
            self._accesses[Tier.DEVICE] += len(active)

    def _begin(self, number: int, experts: list[int], tokens: list[int]) -> None:
        self._layer, layer = number, self._layers[number]
        self._take_arrivals()
        rows = dict(zip(experts, tokens, strict=True))
        order = sorted(experts, key=lambda expert: -rows[expert])
        layer.note(order)
        held = self._memory.held(number)
        # an expert may be in the area and have been copied here by now: then either will do
        self._later = [expert for expert in experts if expert in held]
        self._needed = set(experts)
        self._open = self._needed.difference(self._later)
        missing = [expert for expert in order if expert in self._open and expert not in layer.cached]
        self._waves = False
        for expert in missing:
            self._accesses[self._memory.tier(number, expert)] += 1
        self._accesses[Tier.DEVICE] += len(experts) - len(missing)
        waiting = [expert for expert in missing if expert not in layer.coming]
        self._aside = self._memory.aside(number, {expert: rows[expert] for expert in waiting}) if waiting else []
        self._admissible = list(self._aside)
        self._open.difference_update(self._aside)
        self._waiting = deque(expert for expert in waiting if expert not in self._aside)
        self._start()

    def _ready(self) -> list[int]:
        layer = self._layers[self._layer]
        while True:
            self._take_arrivals()
            if ready := [expert for expert in self._open if expert in layer.cached]:
                self._open.difference_update(ready)
                return ready
            if self._later:
                later, self._later = self._later, []
                return later
            if self._aside:
                aside, self._aside = self._aside, []
                return aside
            if not self._open:
                self._end()
                return []
            self._start()
            self._wait()

    def _wait(self) -> None:
        begin = time.perf_counter()
        arrival = self._memory.arrival(wait=True)
        cause = StallCause.CAPACITY if self._waves else StallCause.MISS
        self._stall_s[cause] += time.perf_counter() - begin
        assert arrival is not None
        self._take(arrival)

    def _take_arrivals(self) -> None:
        while (arrival := self._memory.arrival(wait=False)) is not None:
            self._take(arrival)

    def _take(self, arrival: Arrival) -> None:
        layer = self._layers[arrival.layer]
        layer.coming.discard(arrival.expert)
        if arrival.error is not None:
            self._release(arrival.slot)
            if arrival.layer == self._layer and arrival.expert in self._needed:
                raise arrival.error
            return
        assert arrival.source is not None
        self._bytes[arrival.source] += self._slot_bytes
        layer.cached[arrival.expert] = arrival.slot
        self._memory.bind(arrival.layer, arrival.expert, arrival.slot)

    def _start(self) -> None:
        """Begin to read those that are missing, as far as there are slots."""
        while self._waiting:
            slot = self._slot()
            if slot is None:
                self._waves = True
                return
            self._fetch(self._layer, self._waiting.popleft(), slot, urgent=True)

    def _fetch(self, number: int, expert: int, slot: Slot, *, urgent: bool) -> None:
        self._layers[number].coming.add(expert)
        self._memory.fetch(number, expert, slot, urgent=urgent)

    def _slot(self) -> Slot | None:
        if (slot := self._unused()) is not None:
            return slot
        layer = self._layers[self._layer]
        others = [n for n, other in enumerate(self._layers) if n != self._layer and len(other.cached) > other.share]
        if len(layer.cached.keys() - self._needed) > 0:
            self._evict(self._layer, layer.policy.victim(list(layer.cached), self._needed))
        elif others:
            # a step that failed has left them here
            self._evict(others[0], self._layers[others[0]].policy.victim(list(self._layers[others[0]].cached), ()))
        return self._unused()

    def _unused(self) -> Slot | None:
        if self._free:
            return self._free.pop()
        if self._made < self._size:
            self._made += 1
            return self._memory.slot()
        return None

    def _end(self) -> None:
        """Keep the layer's share, and read ahead for the next layer into slots that are free."""
        self._trim(self._layer)
        self._admit(self._layer)
        if not self.read_ahead:
            return
        number = (self._layer + 1) % len(self._layers)
        layer, held = self._layers[number], self._memory.held(number)
        for expert in np.argsort(-layer.activity_E, kind="stable").tolist():
            if layer.activity_E[expert] < _SURE:
                return
            if expert in held or expert in layer.cached or expert in layer.coming:
                continue
            slot = self._unused()
            if slot is None:
                return
            self._fetch(number, expert, slot, urgent=False)

    def _admit(self, number: int) -> None:
        """Bring one of the experts in that were computed beside the area, if the policy values it more than another."""
        layer = self._layers[number]
        for expert in self._admissible:
            room = layer.share - len(layer.cached) - len(layer.coming)
            if room > 0 or (layer.cached and layer.policy.victim([*layer.cached, expert], ()) != expert):
                if (slot := self._unused()) is not None:
                    self._fetch(number, expert, slot, urgent=False)
                return

    # --- Told -----------------------------------------------------------------------------------------------------

    def cached(self, number: int) -> frozenset[int]:
        return frozenset(self._layers[number].cached)

    def counts(self, held: int) -> TierCounts:
        """All counts up to now. `held`: experts in memory beside the area. Any thread may call it."""
        device, host, disk = self._accesses
        return TierCounts(
            accesses=(device, host, disk),
            fetched_bytes=dict(self._bytes),
            stall_s=dict(self._stall_s),
            resident=held + sum(len(layer.cached) for layer in self._layers),
        )


def difference(now: TierCounts, before: TierCounts) -> TierCounts:
    """What was counted between two moments."""
    device, host, disk = (a - b for a, b in zip(now.accesses, before.accesses, strict=True))
    return TierCounts(
        accesses=(device, host, disk),
        fetched_bytes={source: n - before.fetched_bytes.get(source, 0) for source, n in now.fetched_bytes.items()},
        stall_s={cause: s - before.stall_s.get(cause, 0.0) for cause, s in now.stall_s.items()},
        resident=now.resident,
    )
