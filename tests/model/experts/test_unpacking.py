"""Packed experts in stacks compute, bit for bit, what their unpacked weights compute there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm, weight_bytes
from elastic_moe.model import int4, int8
from elastic_moe.model.experts import unpacking
from elastic_moe.model.experts.interface import ABSENT, Tensors
from elastic_moe.model.experts.rounding import rounded
from elastic_moe.model.experts.stacked import StackedExperts
from elastic_moe.model.experts.tiered_stacks import TieredStacks
from elastic_moe.model.experts.unpacking import Packing, active_slots
from tests.model.experts.test_stacked import EXPERTS, KINDS, TOP_K, Experts
from tests.model.packing import E2M1, E4M3

FORMS = [form for form in ExpertForm if form is not ExpertForm.PLAIN]
WHOLE_BYTES = (ExpertForm.INT8, ExpertForm.FP8, ExpertForm.MXFP8)
BF16 = torch.bfloat16


def draw(form: ExpertForm, outputs: int, inputs: int, seed: int) -> tuple[Tensors, Tensor]:
    """A matrix of this form by endings of its name, and its weights [N, K], both drawn at random."""
    rng = np.random.default_rng(seed)
    whole = form in WHOLE_BYTES
    group = 128 if whole and form is not ExpertForm.MXFP8 else 32
    groups = -(-inputs // group)
    scales = torch.from_numpy(rng.uniform(0.001, 0.02, (outputs, groups))).to(
        {ExpertForm.INT4_HALF: torch.float16}.get(form, torch.float32 if whole else BF16)
    )
    factors = scales.float().numpy()
    each = None
    if form is ExpertForm.NVFP4:
        group = 16
        made = rng.choice(np.flatnonzero(np.isfinite(E4M3)), (outputs, inputs // 16)).astype(np.uint8)
        scales, each = torch.from_numpy(made), rng.uniform(0.001, 0.02, (outputs, 1)).astype(np.float32)
        factors = E4M3[made].astype(np.float32) * each
    if form is ExpertForm.MXFP8:
        powers = rng.integers(100, 140, (outputs, groups)).astype(np.uint8)
        scales, factors = torch.from_numpy(powers), np.exp2(powers.astype(np.float32) - 127)
    zeros = None
    if form is ExpertForm.INT8:
        codes = rng.integers(-127, 128, (outputs, inputs))
        stored, values = torch.from_numpy(codes.astype(np.int8)), codes.astype(float)
    elif whole:
        codes = rng.choice(np.flatnonzero(np.isfinite(E4M3)), (outputs, inputs))
        stored, values = torch.from_numpy(codes.astype(np.uint8).view(np.int8)), E4M3[codes]
    else:
        codes = rng.integers(0, 16, (outputs, inputs))
        stored = torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))
        # beside half of the scale, E2M1 counts twice
        values = {ExpertForm.MXFP4: 2 * E2M1[codes], ExpertForm.NVFP4: E2M1[codes]}.get(form, codes.astype(float))
        if form not in (ExpertForm.MXFP4, ExpertForm.NVFP4):
            zeros = rng.integers(0, 16, (outputs, groups))
            values = values - zeros.repeat(group, 1)[:, :inputs]
    weights = torch.from_numpy(values.astype(np.float32) * factors.repeat(group, 1)[:, :inputs]).to(BF16)
    found = {"": stored, int8.SCALE: scales}
    if zeros is not None:
        found[int4.ZERO] = torch.from_numpy(zeros.astype(np.uint8))
    if each is not None:
        found[int4.EACH] = torch.from_numpy(each)
    return found, weights


def expert(module: Experts, form: ExpertForm, seed: int) -> tuple[Tensors, Tensors]:
    """An expert with the sizes of the module's, packed and as the module would have it."""
    packed: Tensors = {}
    plain: Tensors = {}
    for n, (name, tensor) in enumerate(module.weights[0].items()):
        if tensor.dim() == 1:
            packed[name] = plain[name] = module.weights[seed][name].to(BF16)
            continue
        shape = tensor.T.shape if module.is_transposed else tensor.shape
        parts, weights = draw(form, *shape, 10 * seed + n)
        packed |= {name + ending: part for ending, part in parts.items()}
        plain[name] = weights.T.contiguous() if module.is_transposed else weights
    return packed, plain


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inputs", [64, 32, 160, 416])
def test_weights_are_those_of_the_codes(form: ExpertForm, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "PIECE", 5 * inputs * 2)
    packing, drawn = Packing(form, BF16), [draw(form, 5, inputs, seed) for seed in range(7)]
    kept = [packing.kept({f"m{ending}": part for ending, part in parts.items()}) for parts, _ in drawn]
    stacks = {name: torch.stack([tensors[name] for tensors in kept]) for name in kept[0]}
    want = torch.stack([weights for _, weights in drawn])
    assert torch.equal(packing.weights(stacks, "m"), want)
    chosen = torch.tensor([6, 0, 3])
    assert torch.equal(packing.weights(stacks, "m", chosen), want[chosen])
    assert torch.equal(packing.matrix(kept[2], "m"), want[2])
    assert packing.inputs(kept[0]["m"]) == inputs
    # what another worker sends is kept as it is
    again = packing.kept(kept[1])
    assert again.keys() == kept[1].keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in kept[1].items())


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_weight_takes_the_bytes_that_are_counted(form: ExpertForm) -> None:
    parts, weights = draw(form, 64, 1024, 0)
    kept = Packing(form, BF16).kept({f"m{ending}": part for ending, part in parts.items()})
    bytes_of_weight = sum(tensor.nbytes for tensor in kept.values()) / weights.numel()
    each_bytes = 4 / 1024 if form is ExpertForm.NVFP4 else 0
    assert bytes_of_weight == weight_bytes(form, 2) + each_bytes
    assert bytes_of_weight / 2 <= (0.52 if form in WHOLE_BYTES else 0.29)


def same_choices(rows: int, held: set[int], seed: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(rows)])
    index = torch.where(torch.isin(index, torch.tensor(sorted(held))), index, ABSENT)
    return torch.randn(rows, hidden, generator=g).to(BF16), index, torch.rand(rows, TOP_K, generator=g)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["plain", "transposed, with biases", "without a gate"])
def test_layers_compute_as_unpacked_ones_after_every_flip(form: ExpertForm, kind: str) -> None:
    """Of one row fewer slots are unpacked than there are; experts come, go and stay."""
    module: Any = Experts(**KINDS[kind], hidden=64, width=96)
    packed, plain = StackedExperts(module, packing=Packing(form, BF16)), StackedExperts(module)
    made = [expert(module, form, seed) for seed in range(EXPERTS)]
    for layer, which in ((packed, 0), (plain, 1)):
        layer.reserve(4)
        for number in (4, 1, 3, 0):
            layer.put(number, made[number][which])
    held = {0, 1, 3, 4}
    for wanted, new in ((held, None), ({1, 4, 5}, 5), ({0, 1, 2, 4, 5}, 2)):
        if new is not None:
            packed.put(new, made[new][0], borrowed=True)
            plain.put(new, made[new][1])
            if 0 in wanted:
                for layer, which in ((packed, 0), (plain, 1)):
                    layer.put(0, made[0][which])
        packed.keep_only(wanted)
        plain.keep_only(wanted)
        assert packed.held() == plain.held() == wanted
        for rows in (1, 2, 40):
            x, index, weight = same_choices(rows, wanted, rows, 64)
            assert torch.equal(packed.forward(x, index, weight), plain.forward(x, index, weight))
    # an expert that is sent computes the same elsewhere
    other = StackedExperts(module, packing=Packing(form, BF16))
    other.put(5, packed.get(5))
    other.keep_only({5})
    x, index, weight = same_choices(9, {5}, 1, 64)
    plain.keep_only({5})
    assert torch.equal(other.forward(x, index, weight), plain.forward(x, index, weight))


@pytest.mark.parametrize("form", FORMS)
def test_experts_in_slots_of_a_cache(form: ExpertForm) -> None:
    module: Any = Experts(**KINDS["transposed, with biases"], hidden=64, width=96)
    packed, plain = (TieredStacks(module, packing=packing) for packing in (Packing(form, BF16), None))
    for layer, which in ((packed, 0), (plain, 1)):
        made = [expert(module, form, seed)[which] for seed in range(EXPERTS)]
        layout = layer.layout(made[0])
        slots = torch.zeros(EXPERTS, layout.nbytes, dtype=torch.uint8)
        for number, tensors in enumerate(made):
            layer.write(tensors, slots[number])
        layer.put(0, layer.read(slots[0]))
        layer.keep_only({0})
        for number in range(1, EXPERTS):
            layer.bind(number, slots[number])
        layer.serve(range(EXPERTS))
        layer.supply(0, lambda experts, counts: experts if counts is not None else [])
        layer.run_lent(slots[1])
    assert packed.layout({}).nbytes < plain.layout({}).nbytes
    for rows in (1, 20):
        x, index, weight = same_choices(rows, set(range(EXPERTS)), rows, 64)
        assert torch.equal(packed.forward(x, index, weight), plain.forward(x, index, weight))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 5))
def test_active_slots_are_those_with_rows(counts: list[int], absent: int) -> None:
    end_S = torch.tensor(counts).cumsum(0).to(torch.int32)
    pairs = sum(counts) + absent
    slot_A, end_A = active_slots(end_S, pairs)
    assert len(slot_A) == len(end_A) == min(pairs, len(counts))
    assert end_A.dtype == torch.int32
    active = [slot for slot, count in enumerate(counts) if count]
    assert slot_A[: len(active)].tolist() == active
    assert end_A[: len(active)].tolist() == [int(end_S[slot]) for slot in active]
    # the others have no rows
    assert set(end_A[len(active) :].tolist()) <= {sum(counts)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", [ExpertForm.INT8, ExpertForm.INT4])
def test_what_the_host_rounds(form: ExpertForm, transposed: bool) -> None:
    matrix = torch.randn(96, 160, generator=torch.Generator().manual_seed(0)).to(BF16)
    bias = torch.ones(3)
    made = rounded({"m": matrix.T.contiguous() if transposed else matrix, "b": bias}, form, transposed=transposed)
    packing = Packing(form, BF16)
    got = packing.matrix(packing.kept(made), "m")
    error = (got.float() - matrix.float()).norm() / matrix.float().norm()
    assert error < (0.01 if form is ExpertForm.INT8 else 0.1)
    assert made["b"] is bias
