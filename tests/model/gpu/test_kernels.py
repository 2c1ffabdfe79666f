"""The kernels for GPUs compute what torch's operators do. Without a GPU, Triton's interpreter runs them, if it is asked
to: TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.experts import packed_trial, stacked
from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.experts.stacked import StackedExperts
from elastic_moe.model.experts.unpacking import Packing
from elastic_moe.model.int4 import EACH
from elastic_moe.model.int8 import SCALE
from elastic_moe.model.native.attention import Rules
from elastic_moe.model.rms_norm import RmsNorm
from elastic_moe.model.trunk import flash
from elastic_moe.model.trunk.attention_path import KVShape
from tests.model.experts.test_stacked import EXPERTS, KINDS, Experts, choices
from tests.model.experts.test_unpacking import FORMS
from tests.model.experts.test_unpacking import draw as drawn_matrix

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if find_spec("triton") is None or not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs Triton, and a CUDA GPU or TRITON_INTERPRET=1", allow_module_level=True)

from elastic_moe.model.gpu import decode, few, few_packed, grouped, packed, pairs, router, rows  # noqa: E402 - they import Triton

DEVICE = "cpu" if INTERPRETED else "cuda"


ROUNDING = 2**-5 if INTERPRETED else 2**-7
"""Of bfloat16, which the interpreter rounds towards zero."""


ATTENDED = torch.float16 if INTERPRETED else torch.bfloat16
"""The interpreter multiplies no matrices of bfloat16."""


def draw(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("shape", [(7, 64), (1, 5, 3, 128), (3, 2048), (2, 100), (0, 64)])
@pytest.mark.parametrize("rounds", [True, False])
def test_norm(shape: tuple[int, ...], rounds: bool) -> None:
    x, weight = draw(*shape) * 3, draw(shape[-1], seed=1, dtype=torch.float32)
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    want = ((wide.bfloat16().float() if rounds else wide) * weight).bfloat16()
    got = rows.GpuNorm(formula=RmsNorm(weight=weight, epsilon=1e-6, rounds=rounds))(x)
    torch.testing.assert_close(got, want, rtol=ROUNDING, atol=1e-6)


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 64), (5, 1, 128), (3, 3, 96)])
def test_rotation(heads: int, groups: int, size: int) -> None:
    q, k = draw(1, 9, heads, size).transpose(1, 2), draw(1, 9, groups, size, seed=1).transpose(1, 2)
    cos, sin = draw(1, 9, size, seed=2), draw(1, 9, size, seed=3)
    for x, got in zip((q, k), rows.rotate(q, k, cos, sin), strict=True):
        first, second = x.chunk(2, -1)
        want = x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
        if INTERPRETED:
            torch.testing.assert_close(got, want, rtol=ROUNDING, atol=0.05)
        else:
            assert torch.equal(got, want)


def test_gate() -> None:
    x = draw(5, 2 * 96) * 4
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(rows.silu_gate(x), torch.nn.functional.silu(gate) * up, rtol=ROUNDING, atol=1e-6)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 6), (256, 8)])
@pytest.mark.parametrize("normalises", [True, False])
def test_router(experts: int, top_k: int, normalises: bool) -> None:
    x, weight = draw(17, 64), draw(experts, 64, seed=1)
    choose = router.GpuRouter(weight=weight, top_k=top_k, normalises=normalises, dtype=torch.float32)
    logits, scores, index = choose(x)
    want, order = torch.softmax(x @ weight.T, -1, dtype=torch.float32).topk(top_k, -1)
    if normalises:
        want = want / want.sum(-1, keepdim=True)
    torch.testing.assert_close(scores, want, rtol=1e-2, atol=1e-4)
    assert torch.equal(logits.gather(1, index), logits.gather(1, order))
    assert all(len(set(row)) == top_k for row in index.tolist())


@pytest.mark.parametrize("shape", [(1, 8), (3, 2), (70, 4), (700, 4)])
def test_pairs_come_in_the_order_of_their_slots_and_back(shape: tuple[int, int]) -> None:
    experts, size = 12, 5
    g = torch.Generator().manual_seed(0)
    slot_X = torch.full((experts + 1,), size)
    slot_X[torch.tensor([3, 0, 7, 11, 5])] = torch.arange(size)
    index = torch.randint(-1, experts, shape, generator=g)
    slots = slot_X[index.flatten()]
    place, end = pairs.places(slot_X.to(DEVICE), index.to(DEVICE), size)
    order = slots.argsort(stable=True)
    want = torch.empty_like(order)
    want[order] = torch.arange(len(order))
    assert torch.equal(place.cpu(), want)
    assert end.tolist() == [int((slots <= slot).sum()) for slot in range(size)]
    x, weight = draw(shape[0], 200), torch.rand(shape, generator=g).to(DEVICE)
    sorted_x = pairs.spread(x, place, shape[1])
    assert torch.equal(sorted_x[place], x.repeat_interleave(shape[1], 0))
    sorted_x[int(end[-1]) :] = float("nan")
    got = pairs.gather_sum(sorted_x, place, end, weight)
    held = (slots < size).view(shape).to(DEVICE)
    total = torch.zeros(shape[0], 200, device=DEVICE)
    for k in range(shape[1]):
        total += torch.where(held[:, k, None], x.float() * weight[:, k, None], 0.0)
    torch.testing.assert_close(got, total.bfloat16(), rtol=ROUNDING, atol=1e-6)


@pytest.mark.parametrize(("shape", "hidden", "width"), [((1, 8), 600, 64), ((5, 3), 64, 100)])
def test_few_pairs(shape: tuple[int, int], hidden: int, width: int) -> None:
    experts, size = 12, 5
    g = torch.Generator().manual_seed(0)
    slot_X = torch.full((experts + 1,), size)
    slot_X[torch.tensor([3, 0, 7, 11, 5])] = torch.arange(size)
    index, weight = torch.randint(-1, experts, shape, generator=g), torch.rand(shape, generator=g)
    x, scale = draw(shape[0], hidden), hidden**-0.5
    gate_up, down = draw(size, 2 * width, hidden, seed=1) * scale, draw(size, hidden, width, seed=2)
    got = few.run_few(gate_up, down, slot_X.to(DEVICE), x, index.to(DEVICE), weight.to(DEVICE))
    want = torch.zeros(shape[0], hidden, device=DEVICE)
    for row, k in [(row, k) for row in range(shape[0]) for k in range(shape[1])]:
        slot = int(slot_X[index[row, k]])
        if slot < size:
            gate, up = (x[row].float() @ gate_up[slot].float().T).chunk(2)
            gated = torch.nn.functional.silu(gate) * up
            want[row] += float(weight[row, k]) * (gated @ down[slot].float().T)
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05 * float(want.abs().max()))


def packed_stacks(form: ExpertForm, slots: int, sizes: dict[str, tuple[int, int]]) -> tuple[Packing, Tensors]:
    """Random matrices [slots, N, K] of these names and sizes, as they lie in a layer. The interpreter rounds to
    bfloat16 towards zero, so for it scales are powers of 2, by which weights need no rounding."""
    packing = Packing(form, torch.bfloat16, draw(1).device)
    kept = []
    for slot in range(slots):
        drawn: Tensors = {}
        for name, (outputs, inputs) in sizes.items():
            parts, _ = drawn_matrix(form, outputs, inputs, 10 * slot + len(drawn))
            if form is ExpertForm.NVFP4:
                if INTERPRETED:
                    parts[SCALE] = parts[SCALE] & 0x78
                    parts[EACH] = parts[EACH].log2().round().exp2()
            elif parts[SCALE].dtype == torch.uint8:
                # powers of 2 by their exponents: from 2^-17 to 2^-6
                parts[SCALE] = parts[SCALE] % 12 + 110
            elif INTERPRETED:
                parts[SCALE] = parts[SCALE].float().log2().round().exp2().to(parts[SCALE].dtype)
            drawn |= {name + ending: part.to(DEVICE) for ending, part in parts.items()}
        kept.append(packing.kept(drawn))
    return packing, {name: torch.stack([tensors[name] for tensors in kept]) for name in kept[0]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 32), (9, 160), (16, 544), (24, 1184)])
def test_unpacking_gives_the_bits_of_torch(form: ExpertForm, outputs: int, inputs: int) -> None:
    """Groups of 128 are short at the end; groups of 32 are an odd number, or one."""
    packing, stacks = packed_stacks(form, 4, {"m": (outputs, inputs)})
    want = packing.weights(stacks, "m")
    stack = packing.stack(stacks, "m")
    assert torch.equal(packed.unpack(stack, None, torch.bfloat16), want)
    chosen = torch.tensor([3, 0, 3], device=DEVICE)
    assert torch.equal(packed.unpack(stack, chosen, torch.bfloat16), want[chosen])
    assert packed.unpack(stack, chosen[:0], torch.bfloat16).shape == (0, outputs, inputs)
    packing.dtype = torch.float32
    assert torch.equal(packed.unpack(stack, chosen, torch.float32), packing.weights(stacks, "m", chosen))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "hidden", "width"), [((1, 8), 608, 64), ((5, 3), 64, 96), ((3, 2), 1056, 160)])
def test_few_pairs_of_packed_experts_are_computed_as_unpacked_ones(
    form: ExpertForm, shape: tuple[int, int], hidden: int, width: int
) -> None:
    experts, size = 12, 5
    g = torch.Generator().manual_seed(0)
    slot_X = torch.full((experts + 1,), size)
    slot_X[torch.tensor([3, 0, 7, 11, 5])] = torch.arange(size)
    index, weight = torch.randint(-1, experts, shape, generator=g), torch.rand(shape, generator=g)
    packing, stacks = packed_stacks(form, size, {"up": (2 * width, hidden), "down": (hidden, width)})
    rest = slot_X.to(DEVICE), draw(shape[0], hidden) * hidden**-0.5, index.to(DEVICE), weight.to(DEVICE)
    got = few_packed.run_few(packing.stack(stacks, "up"), packing.stack(stacks, "down"), *rest)
    want = few.run_few(packing.weights(stacks, "up"), packing.weights(stacks, "down"), *rest)
    torch.testing.assert_close(got, want, rtol=2 * ROUNDING, atol=2 * ROUNDING * float(want.abs().max()))
    assert got.isfinite().all()
    assert got.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("outputs", "inputs"), [(72, 160), (64, 1184)])
def test_grouped_products_of_packed_experts(form: ExpertForm, outputs: int, inputs: int) -> None:
    """Some slots have no rows, and one has more than a program takes at a time. Rows past the end are not written."""
    packing, stacks = packed_stacks(form, 5, {"m": (outputs, inputs)})
    counts = [3, 0, 40, 1, 0]
    end = torch.tensor(counts).cumsum(0).to(DEVICE, torch.int32)
    # bfloat16 has the range for any sums, float16 for those of small numbers
    x = draw(sum(counts) + 2, inputs, dtype=ATTENDED) / 8
    got = grouped.grouped(x, packing.stack(stacks, "m"), end)
    packing.dtype = torch.float32
    weights = packing.weights(stacks, "m")
    slot = torch.arange(5).repeat_interleave(torch.tensor(counts))
    want = torch.einsum("ni,noi->no", x[: len(slot)].float(), weights.to(ATTENDED).float()[slot.to(DEVICE)])
    bound = 2**-7 * float(want.abs().max())
    torch.testing.assert_close(got[: len(slot)].float(), want, rtol=ROUNDING, atol=bound)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of rows that were not computed and hold any numbers
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_a_layer_of_packed_experts_gives_the_bits_of_unpacked_ones(
    form: ExpertForm, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unpacked first, with fewer pairs than slots and with more, before and after experts have changed slots."""
    monkeypatch.setattr(grouped, "MOST_ROWS", 0)
    monkeypatch.setattr(few, "MOST_PAIRS", 0)
    if INTERPRETED:
        # which cannot try products in bfloat16
        monkeypatch.setattr(stacked, "tried", lambda *_: None)
    module = Experts(**KINDS["plain"], hidden=128, width=64).to(DEVICE)
    sizes = {"gate_up_proj": (128, 128), "down_proj": (128, 64)}
    packing, stacks = packed_stacks(form, EXPERTS, sizes)
    packed_layer = StackedExperts(module, kernels=True, packing=Packing(form, torch.bfloat16, draw(1).device))
    plain_layer = StackedExperts(module, kernels=True)
    for held in ({0, 2, 3, 5}, {1, 2, 3, 4, 5}):
        for expert in held - packed_layer.held():
            packed_layer.put(expert, {name: stack[expert] for name, stack in stacks.items()}, borrowed=True)
            plain_layer.put(expert, {name: packing.weights(stacks, name)[expert] for name in sizes}, borrowed=True)
        packed_layer.keep_only(held)
        plain_layer.keep_only(held)
        x, index, weight = (t.to(DEVICE) for t in choices(rows, frozenset(held), rows, 128))
        got, want = (layer.forward(x.bfloat16(), index, weight) for layer in (packed_layer, plain_layer))
        assert torch.equal(got, want)
        assert got.any()


@pytest.mark.parametrize("form", FORMS)
def test_kernels_for_packed_experts_are_tried_before_they_are_used(
    form: ExpertForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = draw(1).device
    found = partial(packed_trial.tried.__wrapped__, form, ATTENDED, device)
    assert found() is None
    right_few, right_product, right_unpack = few_packed.run_few, grouped.grouped, packed.unpack
    monkeypatch.setattr(few_packed, "run_few", lambda *given: right_few(*given) * 1.1)
    assert found() == "they multiply few rows wrongly"
    monkeypatch.setattr(grouped, "grouped", lambda *given: right_product(*given) * 1.1)
    assert found() == "they multiply wrongly"
    monkeypatch.setattr(packed, "unpack", lambda *given: right_unpack(*given) * 1.1)
    assert found() == "they unpack wrongly"
    monkeypatch.setattr(packed, "unpack", None)
    assert found() == "'NoneType' object is not callable"
    monkeypatch.setattr(stacked, "tried", lambda *_: found())
    module = Experts(**KINDS["plain"], hidden=128, width=64).to(DEVICE)
    layer = StackedExperts(module, kernels=True, packing=Packing(form, torch.bfloat16, device))
    assert layer.packing is not None
    assert layer._few is layer._grouped is layer.packing.kernels is None


@pytest.mark.parametrize("sizes", [(64, 64), (96, 64), (256, 128)])
def test_the_kernel_for_single_tokens_is_tried_before_it_is_used(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [KVShape(num_heads=2, key_size=sizes[0], value_size=sizes[1])]
    settings = {"dtype": ATTENDED, "device": torch.device(DEVICE), "block_size": 16}
    assert flash.singles_are_right(shapes, **settings)  # type: ignore[arg-type]
    monkeypatch.setattr(decode, "_KEYS", 0)
    assert not flash.singles_are_right(shapes, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("page", [4, 16])
@pytest.mark.parametrize(("heads", "groups", "key", "value"), [(4, 2, 64, 64), (8, 1, 128, 128), (6, 2, 96, 64)])
@pytest.mark.parametrize(
    "rules", [{}, {"window": 9}, {"softcap": 5.0}, {"sinks": True}, {"window": 70, "sinks": True}], ids=str
)
def test_attention_of_single_rows(
    page: int, heads: int, groups: int, key: int, value: int, rules: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_processors", lambda _: 8)
    lengths = [1, 5, 0, 70, 200, 64]
    columns = -(-max(lengths) // page)
    g = torch.Generator().manual_seed(0)
    tables = torch.randperm(columns * len(lengths), generator=g).view(len(lengths), columns)
    caches = (
        draw(tables.numel(), page, groups, key, dtype=ATTENDED),
        draw(tables.numel(), page, groups, value, seed=1, dtype=ATTENDED),
    )
    # a step of other tokens too: the rows are every second one, and q, k, v are views as transformers makes them
    tokens, at = 2 * len(lengths), torch.arange(len(lengths)) * 2 + 1
    q = draw(tokens, heads, key, seed=2, dtype=ATTENDED).transpose(0, 1)
    k, v = (
        draw(tokens, groups, key, seed=3, dtype=ATTENDED).transpose(0, 1),
        draw(tokens, groups, value, seed=4, dtype=ATTENDED).transpose(0, 1),
    )
    sinks = draw(heads, seed=5) if rules.get("sinks") else None
    rule = Rules(scale=key**-0.5, window=rules.get("window"), softcap=rules.get("softcap"), sinks=sinks)  # type: ignore[arg-type]
    before = [cache.clone() for cache in caches]
    out = torch.zeros(tokens, heads, value, dtype=ATTENDED, device=DEVICE)
    batch = decode.DecodeRows(
        rows_R=at.to(DEVICE), tables_RC=tables.to(DEVICE), keys_R=torch.tensor(lengths, device=DEVICE)
    )
    batch.attend(caches, q, k, v, rule, out)
    for n, length in enumerate(lengths):
        if not length:
            continue
        places = [(int(tables[n, p // page]), p % page) for p in range(length)]
        for cache, new in zip(before, (k, v), strict=True):
            cache[places[-1]] = new[:, at[n]]
        keys = torch.stack([before[0][place] for place in places]).float().repeat_interleave(heads // groups, 1)
        values = torch.stack([before[1][place] for place in places]).float().repeat_interleave(heads // groups, 1)
        scores = torch.einsum("nd,lnd->nl", q[:, at[n]].float(), keys) * rule.scale
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        if rule.window is not None:
            scores[:, : max(0, length - rule.window)] = float("-inf")
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None]], 1)
        weights = scores.softmax(-1)[:, :length]
        want = torch.einsum("nl,lnd->nd", weights, values)
        torch.testing.assert_close(out[at[n]].float(), want, rtol=0.02, atol=0.02)
    for cache, want in zip(caches, before, strict=True):
        assert torch.equal(cache, want)
    assert not out[::2].any()
