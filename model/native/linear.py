"""Packs matrices for the native library, and computes a linear layer."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe.model.int8 import GROUP
from elastic_moe.model.native.memory import allocate

_PANEL = 64
"""Columns in a panel, as in gemm.h."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Packed:
    """A matrix [columns, depth] (as in nn.Linear) in panels; see gemm.h, and gemm8.h for 8 bits.

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
    bits: int = 16

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix itself, without the padding of its last panel."""
        return self.columns * _column_bytes(self.depth, self.bits)


def _column_bytes(depth: int, bits: int) -> int:
    return depth * 2 if bits == 16 else depth + -(-depth // GROUP) * 4


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
    packed = _allocate(lib, weight, parts, interleaved, 16, into)
    lib.emoe_pack(weight.data_ptr(), *_shape(packed), packed.data.data_ptr())
    return packed


def pack8(
    lib: ctypes.CDLL,
    values: Tensor,
    scales: Tensor,
    *,
    parts: int = 1,
    interleaved: bool = False,
    into: Tensor | None = None,
) -> Packed:
    """Copy a matrix that `quantize` has rounded into panels, as `pack` does. K must be even."""
    values, scales = values.contiguous(), scales.contiguous()
    packed = _allocate(lib, values, parts, interleaved, 8, into)
    lib.emoe_pack8(values.data_ptr(), scales.data_ptr(), *_shape(packed), packed.data.data_ptr())
    return packed


def _allocate(
    lib: ctypes.CDLL, matrix: Tensor, parts: int, interleaved: bool, bits: int, into: Tensor | None
) -> Packed:
    columns, depth = matrix.shape
    if into is not None:
        return Packed(lib, into, columns, depth, parts, interleaved, bits)
    padded = -(-columns // parts // _PANEL) * parts * _PANEL
    data, release = allocate(padded * _column_bytes(depth, bits))
    packed = Packed(lib, data, columns, depth, parts, interleaved, bits)
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
    return values, scales


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
        weight.columns,
        None if bias is None else bias.data_ptr(),
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
        size = -(-self.columns // _PANEL) * _PANEL * self.depth
        data, release = allocate(self.heads * size * 2)
        self._data = data.view(torch.bfloat16).view(self.heads, size)
        for weight, into in zip(weight_NCK, self._data, strict=True):
            pack(lib, weight, into=into)
        weakref.finalize(self, release).atexit = False

    @property
    def nbytes(self) -> int:
        return self.heads * self.columns * self.depth * 2

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
