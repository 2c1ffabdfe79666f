"""Experts of a GPU's layer that come during a step are computed as those that are always there."""

from __future__ import annotations

import random

import pytest
import torch

from elastic_moe.model import staging
from elastic_moe.model.experts import tiered_stacks
from elastic_moe.model.experts.stacked import StackedExperts
from elastic_moe.model.experts.tiered_stacks import TieredStacks
from elastic_moe.model.record_layout import PAGE
from tests.model.experts.test_stacked import EXPERTS, KINDS, PLAIN, Experts, choices

EVERY = frozenset(range(EXPERTS))


class Coming:
    """Hands the experts of a step out in batches: those in the stacks or beside them in one, others one by one."""

    def __init__(self, module: Experts, stacks: TieredStacks, lent: set[int], rng: random.Random) -> None:
        self.module, self.stacks, self.lent, self.rng = module, stacks, lent, rng
        self.nbytes = stacks.layout(module.weights[0]).nbytes
        self.seen: list[dict[int, int]] = []
        self.batches: list[list[int]] = []
        self.bound: list[int] = []

    def next(self, experts: list[int], tokens: list[int] | None) -> list[int]:
        if tokens is not None:
            self.seen.append(dict(zip(experts, tokens, strict=True)))
            held = [e for e in experts if e in self.stacks.held()]
            self.batches = [held] * bool(held) + [[e] for e in experts if e not in held]
            self.rng.shuffle(self.batches)
        for expert in self.bound:
            self.stacks.unbind(expert)
        self.bound = []
        if not self.batches:
            return []
        batch = self.batches.pop()
        outside = [e for e in batch if e not in self.stacks.held()]
        slots = {e: self.slot(e) for e in outside}
        assert self.stacks.can_borrow or not self.lent
        self.stacks.lend({e: slot for e, slot in slots.items() if e in self.lent})
        for expert in slots.keys() - self.lent:
            self.stacks.bind(expert, slots[expert])
            self.bound.append(expert)
        return batch

    def slot(self, expert: int) -> torch.Tensor:
        slot = torch.full((self.nbytes,), 255, dtype=torch.uint8)
        self.stacks.write(self.module.weights[expert], slot)
        return slot


def tiered(module: Experts, inside: set[int], beside: set[int], lent: set[int]) -> tuple[TieredStacks, Coming]:
    stacks = TieredStacks(module)
    for expert in sorted(inside):
        stacks.put(expert, module.weights[expert])
    stacks.keep_only(inside)
    for expert in beside:
        stacks.put(expert, module.weights[expert])
    coming = Coming(module, stacks, lent, random.Random(0))
    stacks.borrows = bool(lent)
    stacks.supply(0, coming.next)
    stacks.serve(EVERY)
    return stacks, coming


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    ("inside", "beside", "lent"), [({1, 4}, set(), set()), ({4}, {5}, {2, 3}), (set(), {0}, {1}), (set(), set(), set())]
)
def test_outputs_are_the_same_wherever_experts_lie(
    kind: str, inside: set[int], beside: set[int], lent: set[int]
) -> None:
    module = Experts(**KINDS[kind])
    oracle = StackedExperts(module)
    for expert in EVERY:
        oracle.put(expert, module.weights[expert])
    oracle.keep_only(EVERY)
    stacks, coming = tiered(module, inside, beside, lent)
    for rows in (1, 20):
        for here in (EVERY, frozenset({0, 2, 5})):
            x, index, weight = choices(rows, here, rows, module.hidden)
            got = stacks.forward(x, index.int(), weight)
            torch.testing.assert_close(got, oracle.forward(x, index, weight), rtol=1e-6, atol=1e-6)
            active = {int(e): int((index == e).sum()) for e in index.unique() if e >= 0}
            if not set(active) <= inside:
                assert coming.seen.pop() == active
    assert stacks.forward(x[:0], index[:0], weight[:0]).shape == (0, module.hidden)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tensors for which a layer has waited."""
    seen: list[int] = []
    to_host = staging.to_host

    def note(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.append(len(tensors))
        return to_host(tensors)

    monkeypatch.setattr(staging, "to_host", note)
    return seen


def test_what_is_in_the_stacks_is_computed_as_without_tiers(asked: list[int]) -> None:
    """Where a layer holds all that it serves, it asks the device for nothing; else once, also if nothing is missing."""
    module = Experts(**PLAIN)
    stacks, coming = tiered(module, {0, 1, 2}, set(), set())
    x, index, weight = choices(7, frozenset({0, 1, 2}), 0, module.hidden)
    before = stacks.forward(x, index, weight)
    assert (asked, coming.seen) == ([1], [])
    assert stacks.take_steps() == [sorted({int(e) for e in index.unique()} - {-1})]
    stacks.serve({0, 1, 2})
    assert torch.equal(stacks.forward(x, index, weight), before)
    assert (asked, stacks.take_steps()) == ([1], [])


def test_many_rows_are_not_brought_to_the_host(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    module = Experts(**PLAIN)
    monkeypatch.setattr(tiered_stacks, "HOST_ROWS", 4)
    for rows, tensors in ((4, 2), (5, 1)):
        stacks, coming = tiered(module, {0}, set(), {1, 2, 3, 4, 5})
        if rows > 4:
            coming.lent = set()
        stacks.forward(*choices(rows, EVERY, 0, module.hidden))
        assert asked.pop() == tensors
        assert stacks.can_borrow == (rows == 4)


def test_a_record_has_the_layout_of_pages() -> None:
    module = Experts(**KINDS["transposed, with biases"])
    stacks = TieredStacks(module)
    slot = torch.zeros(stacks.layout(module.weights[0]).nbytes, dtype=torch.uint8)
    assert len(slot) % PAGE == 0
    stacks.write(module.weights[3], slot)
    read = stacks.read(slot)
    slot.fill_(0)
    assert all(torch.equal(read[name], tensor) for name, tensor in module.weights[3].items())
