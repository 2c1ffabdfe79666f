"""The cache area: every expert of a step is computed once from where it lies, and memory stays within the budget."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.messages.epochs import FetchSource, StallCause
from elastic_moe.cluster.placement import Tier
from elastic_moe.model.record_layout import PAGE
from elastic_moe.model.tiers.area import Area
from elastic_moe.model.tiers.readers import Arrival
from elastic_moe.model.tiers.slots import Slot
from elastic_moe.optimizer.buffering.policies import POLICIES, make_policy

EXPERTS = 8


class FakeMemory:
    """Reads arrive in an order that `rng` draws, some of them only when somebody waits."""

    def __init__(self, layers: int, held: Collection[int], rng: random.Random, *, late: float = 0.5) -> None:
        """`late`: share of the looks at which nothing has arrived."""
        self._late = late
        self.layers_held = [set(held) for _ in range(layers)]
        self.bound: dict[tuple[int, int], Slot] = {}
        self.reading: list[tuple[int, int, Slot]] = []
        self.order: deque[tuple[int, int]] = deque()
        """The experts in the order in which they were asked for."""
        self.fails: set[int] = set()
        self.near: set[int] = set()
        """Experts that lie in memory beside a GPU."""
        self.lent: set[int] = set()
        self._rng = rng

    def held(self, layer: int) -> Collection[int]:
        return self.layers_held[layer]

    def bind(self, layer: int, expert: int, slot: Slot) -> None:
        assert slot not in self.bound.values()
        self.bound[layer, expert] = slot

    def unbind(self, layer: int, expert: int, slot: Slot) -> None:
        assert self.bound.pop((layer, expert)) is slot

    def slot(self) -> Slot:
        return Slot(PAGE)

    def tier(self, layer: int, expert: int) -> Tier:
        return Tier.HOST if expert in self.near else Tier.DISK

    def aside(self, layer: int, tokens: Mapping[int, int]) -> list[int]:
        """All experts near by that have one token."""
        assert list(tokens.values()) == sorted(tokens.values(), reverse=True)
        self.lent = {expert for expert, rows in tokens.items() if rows == 1 and expert in self.near}
        return sorted(self.lent)

    def fetch(self, layer: int, expert: int, slot: Slot, *, urgent: bool) -> None:
        assert slot not in self.bound.values(), "an expert is read over another one"
        assert all(slot is not other for _, _, other in self.reading)
        self.reading.append((layer, expert, slot))
        self.order.append((layer, expert))

    def arrival(self, *, wait: bool) -> Arrival | None:
        if not self.reading:
            assert not wait, "nothing is on its way"
            return None
        if not wait and self._rng.random() < self._late:
            return None
        layer, expert, slot = self.reading.pop(self._rng.randrange(len(self.reading)))
        if expert in self.fails:
            error = OSError("the disk is gone")
            return Arrival(layer=layer, expert=expert, slot=slot, source=None, error=error)
        return Arrival(layer=layer, expert=expert, slot=slot, source=FetchSource.DISK)

    @property
    def slots(self) -> int:
        return len(self.bound) + len(self.reading)


def make(memory: FakeMemory, size: int, *, policy: str = "lfru", read_ahead: bool = False) -> Area:
    layers = len(memory.layers_held)
    area = Area(
        memory,
        layers=layers,
        num_experts=EXPERTS,
        policy=lambda: make_policy(policy, EXPERTS),
        slot_bytes=PAGE,
        read_ahead=read_ahead,
    )
    area.resize(size, [EXPERTS - len(held) for held in memory.layers_held])
    return area


def run(area: Area, memory: FakeMemory, layer: int, tokens: dict[int, int]) -> list[int]:
    """One layer of a step. Returns the experts in the order in which they were computed."""
    computed: list[int] = []
    ready = area.next(layer, list(tokens), list(tokens.values()))
    while ready:
        for expert in ready:
            assert expert in memory.layers_held[layer] or (layer, expert) in memory.bound or expert in memory.lent
        computed += ready
        ready = area.next(layer, ready, None)
    return computed


@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(1, 4),
    size=st.integers(1, 20),
    held=st.sets(st.integers(0, EXPERTS - 1), max_size=EXPERTS - 1),
    policy=st.sampled_from(POLICIES),
    read_ahead=st.booleans(),
    near=st.sets(st.integers(0, EXPERTS - 1)),
)
@settings(max_examples=150, deadline=None)
def test_every_active_expert_is_computed_once_within_the_budget(
    seed: int, layers: int, size: int, held: set[int], policy: str, read_ahead: bool, near: set[int]
) -> None:
    rng = random.Random(seed)
    memory = FakeMemory(layers, held, rng)
    memory.near = near
    area = make(memory, size, policy=policy, read_ahead=read_ahead)
    accesses = 0
    for step in range(6):
        for layer in range(layers):
            active = rng.sample(range(EXPERTS), rng.randint(1, EXPERTS))
            accesses += len(active)
            assert sorted(run(area, memory, layer, {e: rng.randint(1, 9) for e in active})) == sorted(active)
            assert memory.slots <= area.size
            if rng.random() < 0.1:
                break  # a step that fails in a layer: the next one begins with the first layer
        if step == 3:
            for there in memory.layers_held:
                there.add(rng.randrange(EXPERTS))
            area.resize(max(1, size - layers), [EXPERTS - len(there) for there in memory.layers_held])
            for layer in range(layers):
                area.forget_held(layer)
            assert not any(expert in memory.layers_held[layer] for layer, expert in memory.bound)
    counts = area.counts(0)
    assert sum(counts.accesses) == accesses
    assert counts.fetched_bytes[FetchSource.DISK] % PAGE == 0


def test_what_is_in_memory_is_computed_while_the_rest_is_read_in_the_order_of_its_tokens() -> None:
    memory = FakeMemory(1, {0, 1}, random.Random(0), late=1)
    area = make(memory, 3)
    ready = area.next(0, [0, 1, 2, 3, 4], [1, 1, 1, 9, 5])
    assert ready == [0, 1]
    assert list(memory.order) == [(0, 3), (0, 4), (0, 2)]


def test_a_share_stays_from_step_to_step_and_is_computed_first() -> None:
    memory = FakeMemory(1, {0}, random.Random(1), late=1)
    area = make(memory, 4, policy="lru")
    run(area, memory, 0, dict.fromkeys(range(EXPERTS), 1))
    kept = {expert for _, expert in memory.bound}
    assert len(kept) == 2
    memory.order.clear()
    computed = run(area, memory, 0, dict.fromkeys(range(EXPERTS), 1))
    assert set(computed[:2]) == kept
    assert {expert for _, expert in memory.order} == set(range(1, EXPERTS)) - kept
    counts = area.counts(1)
    assert counts.accesses[Tier.DEVICE] == 1 + 1 + 2
    assert counts.stall_s[StallCause.CAPACITY] > 0
    assert counts.resident == 3


def test_where_all_fit_nothing_is_read_twice() -> None:
    memory = FakeMemory(2, {0}, random.Random(2))
    area = make(memory, 2 * (EXPERTS - 1))
    for layer in (0, 1, 0, 1):
        run(area, memory, layer, dict.fromkeys(range(EXPERTS), 1))
    assert len(memory.order) == 2 * (EXPERTS - 1)


def test_reading_ahead_takes_free_slots_for_experts_that_are_nearly_always_active() -> None:
    memory = FakeMemory(2, set(), random.Random(3))
    area = make(memory, 8, read_ahead=True)
    for _ in range(12):
        for layer in (0, 1):
            run(area, memory, layer, {1: 1, 2: 1})
    for layer in (0, 1):
        run(area, memory, layer, {1: 1, 2: 1, 3: 1, 4: 1, 5: 1})
    memory.order.clear()
    run(area, memory, 0, {5: 1})
    assert all(layer == 0 or expert in (1, 2) for layer, expert in memory.order)


def test_an_expert_that_cannot_be_read_fails_the_step_and_not_the_next() -> None:
    memory = FakeMemory(1, {0}, random.Random(4))
    area = make(memory, 2)
    memory.fails = {3}
    with pytest.raises(OSError, match="the disk is gone"):
        run(area, memory, 0, {0: 1, 3: 1})
    memory.fails = set()
    assert sorted(run(area, memory, 0, {0: 1, 3: 1, 4: 1})) == [0, 3, 4]


def test_what_the_host_computes_comes_after_the_device_s_and_is_brought_in_once_it_is_worth_it() -> None:
    memory = FakeMemory(1, {0}, random.Random(5), late=1)
    memory.near = {1, 2}
    area = make(memory, 4, policy="lfu")
    for _ in range(2):
        run(area, memory, 0, {0: 1, 2: 3, 4: 2})
    assert list(memory.order) == [(0, 2), (0, 4)]
    ready = [area.next(0, [0, 1, 3], [1, 1, 2])]
    while ready[-1]:
        ready.append(area.next(0, ready[-1], None))
    assert ready == [[0], [1], [3], []]
    assert list(memory.order)[2:] == [(0, 3)], "what stays in the area has been used more often than 1"
    for _ in range(3):
        run(area, memory, 0, {1: 1})
    assert (0, 1) in memory.order
    assert area.counts(1).accesses == (6, 4, 2)
