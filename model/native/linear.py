"""Packs matrices for the native library, and computes a linear layer."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.int4 import GROUP as FINE
from elastic_moe.model.int4 import NVFP4_GROUP
from elastic_moe.model.int8 import GROUP
from elastic_moe.model.native.memory import allocate

PANEL = 64
"""Columns in a panel, as in gemm.h."""

NUMBERS = {
    ExpertForm.PLAIN: 16,
    ExpertForm.INT8: 8,
    ExpertForm.INT4: 4,
    ExpertForm.INT4_HALF: 5,
    ExpertForm.MXFP4: 6,
    ExpertForm.FP8: 7,
    ExpertForm.MXFP8: 9,
    ExpertForm.NVFP4: 10,
}
"""The library's number of a form, as in forms.h."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Packed:
    """A matrix [columns, depth] (as in nn.Linear) in panels: see gemm.h, for 8 bits gemm8.h, for 4 gemm4.h, gemmf4.h.

    Its memory is released when the object is garbage.
    """

    lib: ctypes.CDLL
    data: Tensor
    columns: int
    depth: int
    parts: int = 1
    """2 if the columns are those of gate and of up, whose panels take turns."""
    interleaved: bool = False
    """With 2 parts: whether gate and up are the even and the odd columns, and not the first and the second half."""
    form: ExpertForm = ExpertForm.PLAIN

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix itself, without the padding of its last panel."""
        return int(self.columns * _column_bytes(self.depth, self.form))


def _column_bytes(depth: int, form: ExpertForm) -> float:
    if form is ExpertForm.PLAIN:
        return depth * 2
    if form in (ExpertForm.INT8, ExpertForm.FP8):
        return depth + -(-depth // GROUP) * 4
    if form is ExpertForm.MXFP8:
        return depth + -(-depth // FINE)
    if form is ExpertForm.NVFP4:
        return depth / 2 + depth // NVFP4_GROUP + 4
    # nibbles and scales, and zero points of 4 bits where there are any
    return -(-depth // FINE) * (FINE / 2 + (2 if form is ExpertForm.MXFP4 else 2.5))


def _panel_bytes(depth: int, form: ExpertForm) -> int:
    """Bytes of a panel. With 4 bits, zero points are filled up to whole cache lines (block_bytes4 in gemm4.h). Powers
    of 2 of MXFP8 and scales of NVFP4 are filled up to words."""
    if form is ExpertForm.MXFP8:
        return PANEL * (depth + -(-depth // GROUP) * 4)
    if form is ExpertForm.NVFP4:
        return PANEL * (depth // 2 + -(-depth // (4 * NVFP4_GROUP)) * 4 + 4)
    if form not in (ExpertForm.INT4, ExpertForm.INT4_HALF):
        return int(PANEL * _column_bytes(depth, form))
    groups = -(-depth // FINE)
    return groups * (FINE // 2 + 2) * PANEL + groups // 4 * 128 + -(-(groups % 4) * 32 // 64) * 64


def can_pack(weight: Tensor) -> bool:
    """Whether the layout exists for this matrix."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.shape[1] % 2 == 0
    )


def pack(
    lib: ctypes.CDLL, weight: Tensor, *, parts: int = 1, interleaved: bool = False, into: Tensor | None = None
) -> Packed:
    """Copy a matrix [N, K], for which `can_pack` is true, into panels. They lie in the bytes `into` if it is given."""
    weight = weight.contiguous()
    packed = _allocate(lib, weight.shape, parts, interleaved, ExpertForm.PLAIN, into)
    lib.emoe_pack(weight.data_ptr(), *_shape(packed), packed.data.data_ptr())
    return packed


def pack8(
    lib: ctypes.CDLL,
    values: Tensor,
    scales: Tensor,
    form: ExpertForm = ExpertForm.INT8,
    *,
    parts: int = 1,
    interleaved: bool = False,
    into: Tensor | None = None,
) -> Packed:
    """Copy a matrix of 8 bits with scales (model/int8.py, or bytes of E4M3) into panels, as `pack` does. K is even.

    Scales are float32 [N, ceil(K / 128)]; those of MXFP8 are E8M0 in uint8 [N, ceil(K / 32)].
    """
    if form is ExpertForm.MXFP8:
        scales = F.pad(scales, (0, -scales.shape[1] % 4))  # to words
    values, scales = values.contiguous(), scales.contiguous()
    packed = _allocate(lib, values.shape, parts, interleaved, form, into)
    lib.emoe_pack8(values.data_ptr(), scales.data_ptr(), *_shape(packed), packed.data.data_ptr())
    return packed


def pack4(
    lib: ctypes.CDLL,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    form: ExpertForm,
    *,
    parts: int = 1,
    interleaved: bool = False,
    into: Tensor | None = None,
) -> Packed:
    """Copy a matrix in 4 bits (model/int4.py) into panels, as `pack` does."""
    codes, scales = codes.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    columns, half = codes.shape
    packed = _allocate(lib, (columns, 2 * half), parts, interleaved, form, into)
    lib.emoe_pack4(
        codes.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        *_shape(packed),
        packed.data.data_ptr(),
    )
    return packed


def pack_nvfp4(
    lib: ctypes.CDLL,
    codes: Tensor,
    scales: Tensor,
    each: Tensor,
    *,
    parts: int = 1,
    interleaved: bool = False,
    into: Tensor | None = None,
) -> Packed:
    """Copy a matrix in NVFP4 (model/int4.py) into panels, as `pack` does. K is a multiple of 16."""
    codes, scales, each = codes.contiguous(), scales.contiguous(), each.contiguous()
    columns, half = codes.shape
    packed = _allocate(lib, (columns, 2 * half), parts, interleaved, ExpertForm.NVFP4, into)
    addresses = (codes.data_ptr(), scales.data_ptr(), each.data_ptr())
    lib.emoe_pack_f4(*addresses, *_shape(packed), packed.data.data_ptr())
    return packed


def round4(lib: ctypes.CDLL, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round a matrix [N, K] of bfloat16, K even, to INT4: (codes [N, K/2], scales [N, G], zero points [N, G]).

    Scale and zero point of a group are those, of the ones tried, that leave the smallest squared error.
    """
    matrix = matrix.contiguous()
    rows, depth = matrix.shape
    codes = torch.empty(rows, depth // 2, dtype=torch.uint8)
    scales = torch.empty(rows, -(-depth // FINE), dtype=torch.bfloat16)
    zeros = torch.empty(scales.shape, dtype=torch.uint8)
    addresses = (codes.data_ptr(), scales.data_ptr(), zeros.data_ptr())
    lib.emoe_round4(matrix.data_ptr(), rows, depth, *addresses, torch.get_num_threads())
    return codes, scales, zeros


def _allocate(
    lib: ctypes.CDLL,
    shape: Sequence[int],
    parts: int,
    interleaved: bool,
    form: ExpertForm,
    into: Tensor | None,
) -> Packed:
    columns, depth = shape
    if into is not None:
        return Packed(lib, into, columns, depth, parts, interleaved, form)
    panels = -(-columns // parts // PANEL) * parts
    data, release = allocate(panels * _panel_bytes(depth, form))
    packed = Packed(lib, data, columns, depth, parts, interleaved, form)
    weakref.finalize(packed, release).atexit = False
    return packed


def _shape(packed: Packed) -> tuple[int, int, int, bool]:
    return packed.columns, packed.depth, packed.parts, packed.interleaved


def unpack(packed: Packed) -> Tensor:
    """Copy the bfloat16 matrix out of its panels. It has the bits that were packed."""
    weight = torch.empty(packed.columns, packed.depth, dtype=torch.bfloat16)
    packed.lib.emoe_unpack(packed.data.data_ptr(), *_shape(packed), weight.data_ptr())
    return weight


def unpack8(packed: Packed) -> tuple[Tensor, Tensor]:
    """Copy the values and scales out of the panels of `pack8`. They have the bits that were packed."""
    values = torch.empty(packed.columns, packed.depth, dtype=torch.int8)
    scales = torch.empty(packed.columns, -(-packed.depth // GROUP), dtype=torch.float32)
    packed.lib.emoe_unpack8(packed.data.data_ptr(), *_shape(packed), values.data_ptr(), scales.data_ptr())
    if packed.form is ExpertForm.MXFP8:
        scales = scales.view(torch.uint8)[:, : -(-packed.depth // FINE)].contiguous()
    return values, scales


def unpack4(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    """Copy codes, scales and zero points out of the panels of `pack4`. They have the bits that were packed."""
    codes = torch.zeros(packed.columns, packed.depth // 2, dtype=torch.uint8)
    half = packed.form is ExpertForm.INT4_HALF
    scales = torch.empty(packed.columns, -(-packed.depth // FINE), dtype=torch.float16 if half else torch.bfloat16)
    zeros = None if packed.form is ExpertForm.MXFP4 else torch.empty(scales.shape, dtype=torch.uint8)
    packed.lib.emoe_unpack4(
        packed.data.data_ptr(),
        *_shape(packed),
        codes.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
    )
    return codes, scales, zeros


def unpack_nvfp4(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Copy codes, scales and outputs' scales out of the panels of `pack_nvfp4`. They have the bits that were packed."""
    codes = torch.zeros(packed.columns, packed.depth // 2, dtype=torch.uint8)
    scales = torch.empty(packed.columns, packed.depth // NVFP4_GROUP, dtype=torch.uint8)
    each = torch.empty(packed.columns, 1)
    addresses = (codes.data_ptr(), scales.data_ptr(), each.data_ptr())
    packed.lib.emoe_unpack_f4(packed.data.data_ptr(), *_shape(packed), *addresses)
    return codes, scales, each


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """Compute `F.linear` in bfloat16, with torch's number of threads: [..., K] -> [..., N]. Sums are in float32."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows = x if x.dim() == 2 else x.reshape(-1, weight.depth)
    out = torch.empty((*x.shape[:-1], weight.columns), dtype=torch.bfloat16)
    weight.lib.emoe_linear(
        rows.data_ptr(),
        rows.shape[0],
        rows.stride(0),
        weight.depth,
        weight.data.data_ptr(),
        NUMBERS[weight.form],
        weight.columns,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def rows(packed: Packed, index: Tensor) -> Tensor:
    """Rows of a matrix in 8 bits, in bfloat16: [...] -> [..., K]. They are what a product with a unit vector gives."""
    assert packed.form is ExpertForm.INT8
    index = index.contiguous()
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= packed.columns):
        raise IndexError(f"expected rows from 0 to {packed.columns - 1}, got {int(index.min())} to {int(index.max())}")
    out = torch.empty((*index.shape, packed.depth), dtype=torch.bfloat16)
    packed.lib.emoe_rows8(
        packed.data.data_ptr(),
        packed.depth,
        index.data_ptr(),
        index.numel(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


class PackedHeads:
    """A matrix [columns, depth] for each of some heads, in panels that follow one another."""

    def __init__(self, lib: ctypes.CDLL, weight_NCK: Tensor) -> None:
        """Copy the matrices, which are bfloat16 on CPU. K is even."""
        self._lib = lib
        self.heads, self.columns, self.depth = weight_NCK.shape
        size = -(-self.columns // PANEL) * PANEL * self.depth
        data, release = allocate(self.heads * size * 2)
        self._data = data.view(torch.bfloat16).view(self.heads, size)
        for weight, into in zip(weight_NCK, self._data, strict=True):
            pack(lib, weight, into=into)
        weakref.finalize(self, release).atexit = False

    @property
    def nbytes(self) -> int:
        return self.heads * self.columns * self.depth * 2

    @property
    def address(self) -> int:
        """Of the first matrix, an argument of native functions."""
        return self._data.data_ptr()

    def multiply(self, x_NTK: Tensor, out_NTC: Tensor) -> None:
        """Compute x times each head's matrix, into `out_NTC`. The last dimension of both is dense."""
        assert x_NTK.stride(2) == 1
        assert out_NTC.stride(2) == 1
        self._lib.emoe_linear_heads(
            x_NTK.data_ptr(),
            *x_NTK.shape[:2],
            *x_NTK.stride()[:2],
            self.depth,
            self._data.data_ptr(),
            self.columns,
            out_NTC.data_ptr(),
            *out_NTC.stride()[:2],
            torch.get_num_threads(),
        )
