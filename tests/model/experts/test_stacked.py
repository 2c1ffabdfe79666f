"""Stacked experts compute what a loop over experts computes, on any device of the stacks."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import elastic_moe.model.experts.stacked
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.experts.cpu import CpuExperts
from elastic_moe.model.experts.interface import ABSENT, LayerExperts, Tensors
from elastic_moe.model.experts.stacked import StackedExperts, grouped_product
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.fitting.fit import layer_experts

EXPERTS, TOP_K = 6, 3


class Experts(nn.Module):
    """As transformers' decorated experts look to us, with whatever a family may have."""

    def __init__(self, *, transposed: bool, bias: bool, gate: bool, hidden: int = 8, width: int = 12) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.is_transposed, self.has_bias, self.has_gate = transposed, bias, gate
        self.hidden = hidden
        self.register_buffer("like", torch.empty(0))
        first, rows = ("gate_up_proj", 2 * width) if gate else ("up_proj", width)
        sizes = {first: (rows, hidden), "down_proj": (hidden, width)}
        g = torch.Generator().manual_seed(0)

        def draw() -> Tensors:
            tensors = {name: torch.randn(size, generator=g) / size[1] ** 0.5 for name, size in sizes.items()}
            biases = {f"{name}_bias": torch.randn(size[0], generator=g) for name, size in sizes.items()} if bias else {}
            return {n: t.T.contiguous() if transposed else t for n, t in tensors.items()} | biases

        self.weights = [draw() for _ in range(EXPERTS)]

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def act_fn(self, x: Tensor) -> Tensor:
        return torch.relu(x)


PLAIN = {"transposed": False, "bias": False, "gate": True}
KINDS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "transposed, with biases": PLAIN | {"transposed": True, "bias": True},
    "without a gate": PLAIN | {"gate": False},
    "odd sizes": PLAIN | {"hidden": 7, "width": 5},
}


def choices(rows: int, held: frozenset[int], seed: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose choices are held or ABSENT."""
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(rows)] or [torch.empty(0, TOP_K)])
    index = index.long().view(rows, TOP_K)
    index = torch.where(torch.isin(index, torch.tensor(sorted(held))), index, ABSENT)
    return torch.randn(rows, hidden, generator=g), index, torch.rand(rows, TOP_K, generator=g)


@pytest.fixture(autouse=True, scope="module")
def uncomputed_rows_are_no_numbers() -> Any:
    """A kernel leaves any numbers in the rows that it skips."""

    def product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        y = grouped_product(x, weight, ends)
        y[int(ends[-1]) :] = torch.nan
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastic_moe.model.experts.stacked, "grouped_product", product)
        yield


def assert_same(module: Experts, stacked: LayerExperts, oracle: LayerExperts, rows: int, seed: int) -> None:
    assert stacked.held() == oracle.held()
    for expert in oracle.held():
        for name, tensor in stacked.get(expert).items():
            assert torch.equal(tensor, module.weights[expert][name])
    x, index, weight = choices(rows, oracle.held(), seed, module.hidden)
    got = stacked.forward(x, index.int(), weight)
    torch.testing.assert_close(got, oracle.forward(x, index, weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_stacks_compute_what_the_loop_does(kind: str) -> None:
    module = Experts(**KINDS[kind])
    stacked, oracle = StackedExperts(module), CpuExperts(module)
    for expert in (4, 1, 3):
        stacked.put(expert, module.weights[expert])
        oracle.put(expert, module.weights[expert])
    stacked.keep_only({1, 3, 4})
    for rows in (0, 1, 20):
        assert_same(module, stacked, oracle, rows, rows)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_history_of_copies_and_flips(data: st.DataObject) -> None:
    """Experts arrive at any time and are used from the next flip on; a flip drops those that it does not place."""
    module = Experts(**KINDS["transposed, with biases"])
    stacked, oracle = StackedExperts(module), CpuExperts(module)
    experts = st.sets(st.integers(0, EXPERTS - 1))
    first = data.draw(experts)
    stacked.reserve(len(first) + data.draw(st.integers(0, 1)))
    for expert in sorted(first, reverse=True):
        stacked.put(expert, module.weights[expert])
        oracle.put(expert, module.weights[expert])
    for flip in range(4):
        wanted = frozenset(data.draw(experts)) & stacked.held()
        stacked.keep_only(wanted)
        oracle.keep_only(wanted)
        assert_same(module, stacked, oracle, 5, flip)
        assert stacked.nbytes == oracle.nbytes
        for expert in data.draw(experts):
            # as it comes, a tensor of its own
            stacked.put(expert, {name: tensor.clone() for name, tensor in module.weights[expert].items()})
            assert expert in stacked.held()
            if expert not in oracle.held():
                with pytest.raises(KeyError):
                    oracle.get(expert)
                oracle.put(expert, module.weights[expert])


def test_a_copy_that_comes_while_a_step_runs_writes_no_slot_in_use() -> None:
    module = Experts(**PLAIN)
    stacked = StackedExperts(module)
    stacked.reserve(2)
    for expert in (0, 1):
        stacked.put(expert, module.weights[expert])
    seen_by_step = stacked._slots
    before = {name: stack.clone() for name, stack in seen_by_step.stacks.items()}
    for expert in (2, 3, 1):
        stacked.put(expert, module.weights[expert])
    assert stacked._slots is seen_by_step
    stacked.keep_only({0, 1})
    assert stacked._slots is seen_by_step
    assert all(torch.equal(stack, before[name]) for name, stack in seen_by_step.stacks.items())
    assert stacked.held() == {0, 1}
    # as many go as come: the flip writes the one slot that is free and makes no new stack
    stacked.put(5, module.weights[5])
    stacked.keep_only({0, 5})
    assert stacked._slots.stacks["down_proj"] is seen_by_step.stacks["down_proj"]
    assert torch.equal(stacked._slots.stacks["down_proj"][0], module.weights[0]["down_proj"])
    assert torch.equal(stacked._slots.stacks["down_proj"][1], module.weights[5]["down_proj"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    module = Experts(**PLAIN, hidden=16, width=16)
    stacked = StackedExperts(module)
    for expert, tensors in enumerate(module.weights):
        stacked.put(expert, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    stacked.keep_only(set(range(EXPERTS)))
    x, index, weight = choices(9, frozenset(range(EXPERTS)), 1, 16)
    together = stacked.forward(x.to(dtype), index, weight)
    for row in range(9):
        alone = stacked.forward(x[row : row + 1].to(dtype), index[row : row + 1], weight[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_experts_on_a_gpu_are_kept_in_the_form_that_is_asked_for() -> None:
    module = Experts(**PLAIN).to("meta")
    plain, packed = layer_experts(module), layer_experts(module, ExpertForm.INT8)
    assert isinstance(plain, StackedExperts)
    assert isinstance(packed, StackedExperts)
    assert plain.packing is None
    assert packed.packing is not None
    assert packed.packing.form is ExpertForm.INT8


def test_a_flip_of_many_layers_is_launched_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies and tables of all layers go together. What experts lay in before is freed when nobody waits for it."""
    modules = [Experts(**KINDS["transposed, with biases"]) for _ in range(3)]
    store = ExpertStore([StackedExperts(module) for module in modules])
    store.reserve([2] * 3)
    arrivals: list[weakref.ref[Tensor]] = []
    for layer, module in enumerate(modules):
        for expert in (0, 1):
            store.put(layer, expert, module.weights[expert])
        for expert in (2, 3)[: 1 + layer % 2]:
            mine = {name: tensor.clone() for name, tensor in module.weights[expert].items()}
            arrivals += [weakref.ref(tensor) for tensor in mine.values()]
            store.put(layer, expert, mine)
        del mine
    launched: list[int] = []
    for name in ("copy_all", "to_device"):
        original = getattr(elastic_moe.model.experts.stacked, name)
        monkeypatch.setattr(
            elastic_moe.model.experts.stacked,
            name,
            lambda first, second, original=original: launched.append(len(first)) or original(first, second),
        )
    wanted = [{0, 2}, {2, 3}, {1, 2}]
    store.keep_only(wanted)
    assert launched == [len(arrivals), 2 * 3]
    assert all(tensor() is not None for tensor in arrivals)
    store.release()
    assert not any(tensor() is not None for tensor in arrivals)
    for layer, module in enumerate(modules):
        assert store.held(layer) == wanted[layer]
        for expert in wanted[layer]:
            for name, tensor in store.get(layer, expert).items():
                assert torch.equal(tensor, module.weights[expert][name])
    # nothing changes, so nothing is launched
    store.keep_only(wanted)
    assert len(launched) == 2
