"""The native experts compute what the PyTorch path computes, and a row does not depend on other rows."""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm, weight_bytes
from elastic_moe.model.int4 import NVFP4_GROUP
from elastic_moe.model.native.experts import Gate, NativeExperts, find_gate
from elastic_moe.model.native.linear import Packed, round4
from tests.model.native.forms import FLOATS, GATES, dequantized4, draw, expert, in_8_bits, in_form, module, sizes

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reference(
    form: ExpertForm,
    gate: Gate,
    experts: dict[int, dict[str, Tensor]],
    transposed: bool,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
) -> Tensor:
    """In float64, with roundings to bfloat16 where the PyTorch path has them, and to 8 bits where the form has them."""

    def linear(rows: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
        matrix = tensors[name].double()
        taken = rows.double() if form in FLOATS else in_8_bits(rows, form)
        out = taken @ (matrix if transposed else matrix.T)
        return (out + tensors[f"{name}_bias"].double() if f"{name}_bias" in tensors else out).bfloat16()

    out = torch.zeros(x.shape, dtype=torch.float64)
    for e, tensors in experts.items():
        row, choice = (index == e).nonzero(as_tuple=True)
        y = linear(gate(linear(x[row], tensors, gate.first)), tensors, "down_proj")
        out.index_add_(0, row, y.double() * weight[row, choice, None].double())
    return out


def routing(seed: int, rows: int, top_k: int, held: list[int], experts: int) -> tuple[Tensor, Tensor]:
    """Choices among all experts; those that are not held are absent."""
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(rows, experts, generator=g).argsort(1)[:, :top_k]
    index[~torch.isin(index, torch.tensor(held))] = -1
    return index, torch.rand(rows, top_k, generator=g)


@given(
    rows=st.integers(0, 300),
    halves=st.tuples(st.integers(1, 100), st.integers(1, 80)),
    gate=st.sampled_from(sorted(GATES)),
    biased=st.booleans(),
    transposed=st.booleans(),
    held=st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True),
    form=st.sampled_from(ExpertForm),
)
@quick
def test_sums_are_right(
    lib: ctypes.CDLL,
    rows: int,
    halves: tuple[int, int],
    gate: str,
    biased: bool,
    transposed: bool,
    held: list[int],
    form: ExpertForm,
) -> None:
    least = NVFP4_GROUP if form is ExpertForm.NVFP4 else 2
    hidden, width = (-(-2 * half // least) * least for half in halves)
    native = NativeExperts(lib, module(GATES[gate], 8, transposed=transposed), GATES[gate], form)
    experts = {}
    for e in held:
        tensors = expert(10 * e, hidden, width, biased=biased, transposed=transposed, gate=gate)
        # what rounding costs is measured elsewhere
        comes, experts[e] = in_form(lib, form, tensors, transposed)
        assert native.takes(comes)
        native.put(e, comes)
    x = draw(99, rows, hidden)
    index, weight = routing(5, rows, 3, held, 8)
    got = native.forward(x, index, weight).double()
    expected = reference(form, GATES[gate], experts, transposed, x, index, weight)
    # A value that lies near the middle of two bfloat16 numbers may be rounded either way: of each expert's hidden
    # values some differ by 2^-8, of its outputs and of the sum too. Weights are below 1, values some units large.
    # Rows that are rounded to integers add to that: the largest of 40,000 differences seen was 1.2 times 2^-6.
    tolerance = 2**-6 if form in FLOATS else 2**-5
    assert ((got - expected).abs() <= tolerance * (expected.abs() + 1)).all()
    assert native.held() == set(held)


@given(rows=st.integers(2, 150), form=st.sampled_from(ExpertForm), data=st.data())
@quick
def test_a_row_does_not_depend_on_its_company(
    lib: ctypes.CDLL, rows: int, form: ExpertForm, data: st.DataObject
) -> None:
    """Also where a matrix is multiplied with many rows in another way than with few."""
    native, (hidden, width) = NativeExperts(lib, module(None, 4), GATES["silu"], form), sizes(form)
    for e in range(4):
        native.put(e, in_form(lib, form, expert(e, hidden, width, biased=False, transposed=False), False)[0])
    x, (index, weight) = draw(1, rows, hidden), routing(2, rows, 2, [0, 1, 2, 3], 4)
    together = native.forward(x, index, weight)
    some = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=9))
    assert torch.equal(native.forward(x[some], index[some], weight[some]), together[some])


def test_threads_and_types_of_routing_change_nothing(lib: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    native = NativeExperts(lib, module(None, 4), GATES["silu"])
    for e in range(4):
        native.put(e, expert(e, 200, 136, biased=True, transposed=False))
    x, (index, weight) = draw(1, 77, 200), routing(2, 77, 2, [0, 1, 3], 4)
    weight = weight.bfloat16()
    alone = native.forward(x, index, weight)
    assert torch.equal(native.forward(x, index.to(torch.int32), weight.float()), alone)
    for threads in (2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(native.forward(x, index, weight), alone)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", sorted(GATES))
def test_an_expert_comes_back_as_it_was_put(lib: ctypes.CDLL, gate: str, transposed: bool) -> None:
    native = NativeExperts(lib, module(None, 1, transposed=transposed), GATES[gate])
    tensors = expert(0, 70, 66, biased=True, transposed=transposed, gate=gate)
    assert native.takes(tensors)
    native.put(0, tensors)
    back = native.get(0)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].is_contiguous() for name in tensors)


@pytest.mark.parametrize("form", [form for form in ExpertForm if form is not ExpertForm.PLAIN])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", ["silu", "gpt-oss"])
def test_a_copy_in_few_bits_is_not_rounded_again(
    lib: ctypes.CDLL, gate: str, transposed: bool, form: ExpertForm
) -> None:
    stores = [NativeExperts(lib, module(None, 1, transposed=transposed), GATES[gate], form) for _ in range(2)]
    comes, _ = in_form(lib, form, expert(0, *sizes(form), biased=True, transposed=transposed), transposed)
    stores[0].put(0, comes)
    sent = stores[0].get(0)
    if not comes["down_proj"].is_floating_point():
        assert all(torch.equal(sent[name], tensor) for name, tensor in comes.items())
    assert stores[1].takes(sent)
    stores[1].put(0, sent)
    arrived = stores[1].get(0)
    assert sent["down_proj"].dtype == (torch.int8 if form.value.endswith("8") else torch.uint8)
    assert arrived.keys() == sent.keys()
    assert all(torch.equal(arrived[name], sent[name]) for name in sent)


@pytest.mark.parametrize("form", ExpertForm)
def test_memory_is_that_of_the_form(lib: ctypes.CDLL, form: ExpertForm) -> None:
    """What the control plane counts is what a layer takes; in 4 bits at most 0.29 of bfloat16's."""
    native = NativeExperts(lib, module(None, 1), GATES["silu"], form)
    native.put(0, in_form(lib, form, expert(0, 768, 256, biased=False, transposed=False), False)[0])
    weights = 3 * 768 * 256
    each_bytes = 4 * (2 * 256 + 768) if form is ExpertForm.NVFP4 else 0
    assert native.nbytes == weights * weight_bytes(form, 2) + each_bytes
    if form.value.endswith(("4", "4-float16")):
        assert native.nbytes <= 0.29 * 2 * weights
    held = native._held[0]
    assert sum(item.data.nbytes for item in held.values() if isinstance(item, Packed)) == native.nbytes


def errors_of_rounding(matrix: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (dequantized4(codes, scales, zeros) - matrix.float()).square().sum(1)


@pytest.mark.parametrize("depth", [64, 70])
def test_rounding_to_4_bits_leaves_little_error(lib: ctypes.CDLL, depth: int) -> None:
    """Less than rounding to the nearest in the whole range of each group does."""
    matrix = draw(3, 50, depth)
    matrix[7] = 0
    matrix[8, :32] = 3.0
    matrix[9] = matrix[9].abs() + 1
    codes, scales, zeros = round4(lib, matrix)
    assert (int((codes & 15).max()), int(zeros.max())) <= (15, 15)
    padded = F.pad(matrix.float(), (0, -depth % 32)).view(50, -1, 32)
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    plain = ((high - low) / 15).bfloat16().float().clamp(min=1e-30)[..., None]
    zero = (-low[..., None] / plain).round().clamp(0, 15)
    rounded = ((padded / plain).round() + zero).clamp(0, 15)
    plain_errors = ((rounded - zero) * plain - padded).square().sum((1, 2))
    errors = errors_of_rounding(matrix, codes, scales, zeros)
    assert (errors <= plain_errors * 1.0001 + 1e-9).all()
    assert errors.sum() < 0.93 * plain_errors.sum()
    assert errors[7] == 0


@pytest.mark.parametrize("form", [ExpertForm.INT8, ExpertForm.INT4])
def test_rounding_twice_is_rounding_once(lib: ctypes.CDLL, form: ExpertForm) -> None:
    """A copy from worker to worker, in its own form, any number of times."""
    tensors = expert(0, 96, 64, biased=False, transposed=False)
    for _ in range(3):
        native = NativeExperts(lib, module(None, 1), GATES["silu"], form)
        native.put(0, tensors)
        before, tensors = tensors, native.get(0)
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)


def test_experts_are_held_until_they_are_dropped(lib: ctypes.CDLL) -> None:
    native = NativeExperts(lib, module(None, 3), GATES["silu"])
    for e in (0, 2):
        native.put(e, expert(e, 64, 32, biased=True, transposed=False))
    one_bytes = (64 * 64 + 64 * 32 + 64 + 64) * 2
    assert (native.held(), native.nbytes) == ({0, 2}, 2 * one_bytes)
    x, index, weight = draw(1, 4, 64), torch.tensor([[-1, 2]] * 4), torch.ones(4, 2)
    second = native.forward(x, index, weight)
    native.drop(0)
    assert (native.held(), native.nbytes) == ({2}, one_bytes)
    with pytest.raises(KeyError):
        native.get(0)
    # its memory is used again, by another expert
    native.put(1, expert(1, 64, 32, biased=True, transposed=False))
    assert torch.equal(native.forward(x, index, weight), second)


def test_odd_sizes_are_left_to_the_pytorch_path(lib: ctypes.CDLL) -> None:
    native = NativeExperts(lib, module(None, 1), GATES["silu"])
    assert not native.takes(expert(0, 70, 65, biased=False, transposed=False))
    assert not native.takes(expert(0, 71, 66, biased=False, transposed=False))


@pytest.mark.parametrize("form", ExpertForm)
def test_a_gate_that_is_not_a_number_stays_so(lib: ctypes.CDLL, form: ExpertForm) -> None:
    """A broken activation must show in the answer, not vanish in a clamp."""
    for name, gate in GATES.items():
        native = NativeExperts(lib, module(None, 1), gate, form)
        native.put(0, in_form(lib, form, expert(0, 64, 64, biased=False, transposed=False, gate=name), False)[0])
        x = draw(1, 2, 64)
        x[0] = math.nan
        out = native.forward(x, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
        assert out[0].isnan().all()
        assert out[1].isfinite().all()


@pytest.mark.parametrize("name", sorted(GATES))
def test_gates_are_found_by_trying(name: str) -> None:
    gate = GATES[name]
    limit = {} if math.isinf(gate.limit) else {"swiglu_limit": gate.limit}
    found = find_gate(module(gate, 1, some_alpha=gate.alpha, unrelated=0.25, **limit))
    assert found is not None
    assert (found.kind, found.interleaved, found.limit) == (gate.kind, gate.interleaved, gate.limit)
    assert gate.kind != 1 or found.alpha == gate.alpha


def test_the_gate_of_gemma_is_found() -> None:
    """torch computes gelu of dense rows and of halves of rows by other instructions."""
    found = find_gate(module(lambda x: F.gelu(x.chunk(2, -1)[0], approximate="tanh") * x.chunk(2, -1)[1], 1))
    assert found is not None
    assert found.kind == 2


def test_other_gates_are_left_alone() -> None:
    assert find_gate(module(lambda x: torch.nn.functional.gelu(x[:, :32]) * x[:, 32:], 1)) is None
    assert find_gate(SimpleNamespace(has_gate=False, act_fn=F.silu)) is None  # type: ignore[arg-type]
