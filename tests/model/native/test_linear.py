"""The native linear layer: packing loses no bit, products are right, and a row does not depend on other rows."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.int8 import GROUP, quantize
from elastic_moe.model.native.linear import (
    Packed,
    PackedHeads,
    can_pack,
    linear,
    pack,
    pack4,
    pack8,
    pack_nvfp4,
    round4,
    rows,
    unpack,
)
from tests.model.native.forms import FOUR_BITS, draw_nvfp4, draw_powers, in_8_bits

shapes = st.tuples(st.integers(1, 300), st.integers(1, 200), st.integers(1, 150).map(lambda half: 2 * half))
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@given(st.integers(1, 300), st.integers(1, 300).map(lambda half: 2 * half))
@quick
def test_unpacking_gives_the_matrix_back(lib: ctypes.CDLL, columns: int, depth: int) -> None:
    weight = draw(columns * 1000 + depth, columns, depth)
    assert torch.equal(unpack(pack(lib, weight)), weight)


@given(shapes, st.booleans())
@quick
def test_products_are_right_to_a_rounding(lib: ctypes.CDLL, shape: tuple[int, int, int], biased: bool) -> None:
    rows, columns, depth = shape
    x, weight = draw(1, rows, depth), draw(2, columns, depth)
    bias = draw(3, columns) if biased else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    # one rounding to bfloat16 (half of 2^-8), and float32 sums of `depth` terms of size about 1
    bound = expected.abs() * 2**-8 + depth * 2**-20
    assert ((linear(x, pack(lib, weight), bias).double() - expected).abs() <= bound).all()


def narrow(lib: ctypes.CDLL, weight: torch.Tensor) -> tuple[Packed, torch.Tensor]:
    """The matrix in 8 bits, and its values."""
    values, scales = quantize(weight)
    return pack8(lib, values, scales), values * scales.repeat_interleave(GROUP, 1)[:, : weight.shape[1]].double()


@given(shapes, st.booleans())
@quick
def test_products_with_8_bits_are_right_to_a_rounding(
    lib: ctypes.CDLL, shape: tuple[int, int, int], biased: bool
) -> None:
    count, columns, depth = shape
    x, (packed, weight) = draw(1, count, depth), narrow(lib, draw(2, columns, depth))
    bias = draw(3, columns) if biased else None
    expected = in_8_bits(x, ExpertForm.INT8) @ weight.T + (0 if bias is None else bias.double())
    bound = expected.abs() * 2**-8 + depth**0.5 * 2**-14
    assert ((linear(x, packed, bias).double() - expected).abs() <= bound).all()


@given(st.integers(1, 300), st.integers(1, 200).map(lambda half: 2 * half))
@quick
def test_rows_of_a_matrix_in_8_bits_are_what_products_find(lib: ctypes.CDLL, columns: int, depth: int) -> None:
    packed, weight = narrow(lib, draw(1, columns, depth))
    index = torch.randint(columns, (3, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows(packed, index), weight[index].float().bfloat16())
    with pytest.raises(IndexError, match=f"expected rows from 0 to {columns - 1}, got 0 to {columns}"):
        rows(packed, torch.tensor([0, columns]))


@given(shapes, st.data(), st.booleans())
@quick
def test_a_row_does_not_depend_on_its_company(
    lib: ctypes.CDLL, shape: tuple[int, int, int], data: st.DataObject, in_8_bits: bool
) -> None:
    count, columns, depth = shape
    x, weight = draw(1, count, depth), draw(2, columns, depth)
    packed = narrow(lib, weight)[0] if in_8_bits else pack(lib, weight)
    together = linear(x, packed, None)
    some = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=9))
    assert torch.equal(linear(x[some], packed, None), together[some])


FORMS = [form for form in ExpertForm if form is not ExpertForm.PLAIN]


def in_narrow_form(lib: ctypes.CDLL, form: ExpertForm, weight: torch.Tensor) -> Packed:
    if form is ExpertForm.INT8:
        return narrow(lib, weight)[0]
    if form is ExpertForm.FP8:
        scales = torch.rand(len(weight), -(-weight.shape[1] // GROUP))
        return pack8(lib, weight.to(torch.float8_e4m3fn).view(torch.int8), scales, form)
    if form is ExpertForm.MXFP8:
        powers = draw_powers(torch.Generator().manual_seed(0), *weight.shape)
        return pack8(lib, weight.to(torch.float8_e4m3fn).view(torch.int8), powers, form)
    if form is ExpertForm.NVFP4:
        return pack_nvfp4(lib, *draw_nvfp4(torch.Generator().manual_seed(0), *weight.shape))
    codes, scales, zeros = round4(lib, weight)
    if form is ExpertForm.INT4_HALF:
        scales = scales.half()
    return pack4(lib, codes, scales, None if form is ExpertForm.MXFP4 else zeros, form)


@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_rows_has_the_bits_of_single_rows(lib: ctypes.CDLL, form: ExpertForm) -> None:
    """Each number of rows up to two tiles and more is code of its own. The depth is more than one piece of a panel."""
    x, packed = draw(1, 30, 4096 + 304), in_narrow_form(lib, form, draw(2, 70, 4096 + 304))
    alone = torch.cat([linear(x[i : i + 1], packed, None) for i in range(len(x))])
    for count in range(2, len(x) + 1):
        assert torch.equal(linear(x[:count], packed, None), alone[:count]), count
    many = x.repeat(4, 1)
    assert torch.equal(linear(many, packed, None), alone.repeat(4, 1))


@pytest.mark.parametrize("form", [*FOUR_BITS, ExpertForm.INT8])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 1e-39])
def test_numbers_that_8_bits_cannot_hold_show_in_the_product(lib: ctypes.CDLL, form: ExpertForm, bad: float) -> None:
    """Infinite ones make the row's products not a number; those near zero are zeros. Other rows are as they were."""
    x, packed = draw(1, 3, 96), in_narrow_form(lib, form, draw(2, 70, 96))
    clean = linear(x, packed, None)
    x[1] = 0
    x[1, 40] = bad
    got = linear(x, packed, None)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].eq(0).all() if bad == 1e-39 else got[1].isnan().all()


def test_deep_matrices_are_taken_in_pieces(lib: ctypes.CDLL) -> None:
    x, weight = draw(1, 101, 5000), draw(2, 70, 5000)
    expected = x.double() @ weight.double().T
    assert ((linear(x, pack(lib, weight), None).double() - expected).abs() <= expected.abs() * 2**-8 + 0.01).all()


@pytest.mark.parametrize("in_8_bits", [False, True])
def test_threads_change_nothing(lib: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, in_8_bits: bool) -> None:
    x, weight = draw(1, 33, 256), draw(2, 500, 256)
    packed = narrow(lib, weight)[0] if in_8_bits else pack(lib, weight)
    alone = linear(x, packed, None)
    for threads in (2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(linear(x, packed, None), alone)


def test_rows_may_lie_apart(lib: ctypes.CDLL) -> None:
    wide, packed = draw(1, 4, 3, 128), pack(lib, draw(2, 64, 64))
    assert torch.equal(linear(wide[..., 32:96], packed, None), linear(wide[..., 32:96].contiguous(), packed, None))
    turned = wide[0].T
    assert torch.equal(linear(wide[0].T[:64].T, packed, None), linear(turned[:64].T.contiguous(), packed, None))


def test_what_cannot_be_packed() -> None:
    assert can_pack(draw(0, 3, 4))
    assert not can_pack(draw(0, 3, 5))
    assert not can_pack(draw(0, 3, 4).float())
    assert not can_pack(draw(0, 4))


@given(shapes, st.integers(1, 5))
@quick
def test_a_matrix_for_each_head(lib: ctypes.CDLL, shape: tuple[int, int, int], heads: int) -> None:
    """As heads lie in a trunk's tensors: tokens before heads, and beside other numbers."""
    rows, columns, depth = shape
    x_TND, weight = draw(1, rows, heads, depth + 3), draw(2, heads, columns, depth)
    out = torch.full((rows, heads, columns + 5), torch.nan, dtype=torch.bfloat16)
    packed = PackedHeads(lib, weight)
    packed.multiply(x_TND[..., :depth].transpose(0, 1), out.transpose(0, 1))
    for head in range(heads):
        own = linear(x_TND[:, head, :depth].contiguous(), pack(lib, weight[head]), None)
        assert torch.equal(out[:, head, :columns], own)
    assert out[..., columns:].isnan().all()
    assert packed.nbytes == weight.nbytes
