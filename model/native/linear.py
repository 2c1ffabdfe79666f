"""Matrices packed for the native library, and a linear layer."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe.model.int8 import GROUP
from elastic_moe.model.native.memory import allocate

_PANEL = 64
"""Columns of a panel, as in gemm.h."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Packed:
    """A matrix [columns, depth] (as nn.Linear has it) in panels; see gemm.h, and gemm8.h for 8 bits.

    Its memory is used again when the object is gone.
    """

    lib: ctypes.CDLL
    data: Tensor
    columns: int
    depth: int
    parts: int = 1
    """2: halves of the columns, gate and up; their panels take turns."""
    interleaved: bool = False
    """With 2 parts: gate and up are even and odd columns, instead of the first and the last ones."""
    bits: int = 16

    @property
    def nbytes(self) -> int:
        """Of the matrix itself, without the padding of its last panel."""
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


def pack(lib: ctypes.CDLL, weight: Tensor, *, parts: int = 1, interleaved: bool = False) -> Packed:
    """A matrix [N, K] for which `can_pack` holds, in panels. A copy."""
    weight = weight.contiguous()
    packed = _allocate(lib, weight, parts, interleaved, 16)
    lib.emoe_pack(weight.data_ptr(), *_shape(packed), packed.data.data_ptr())
    return packed


def pack8(lib: ctypes.CDLL, values: Tensor, scales: Tensor, *, parts: int = 1, interleaved: bool = False) -> Packed:
    """A matrix as `quantize` has made it, in panels; K is even. A copy."""
    values, scales = values.contiguous(), scales.contiguous()
    packed = _allocate(lib, values, parts, interleaved, 8)
    lib.emoe_pack8(values.data_ptr(), scales.data_ptr(), *_shape(packed), packed.data.data_ptr())
    return packed


def _allocate(lib: ctypes.CDLL, matrix: Tensor, parts: int, interleaved: bool, bits: int) -> Packed:
    columns, depth = matrix.shape
    padded = -(-columns // parts // _PANEL) * parts * _PANEL
    data, release = allocate(padded * _column_bytes(depth, bits))
    packed = Packed(lib, data, columns, depth, parts, interleaved, bits)
    weakref.finalize(packed, release).atexit = False
    return packed


def _shape(packed: Packed) -> tuple[int, int, int, bool]:
    return packed.columns, packed.depth, packed.parts, packed.interleaved


def unpack(packed: Packed) -> Tensor:
    """The bfloat16 matrix that was packed, bit for bit. A copy."""
    weight = torch.empty(packed.columns, packed.depth, dtype=torch.bfloat16)
    packed.lib.emoe_unpack(packed.data.data_ptr(), *_shape(packed), weight.data_ptr())
    return weight


def unpack8(packed: Packed) -> tuple[Tensor, Tensor]:
    """What was packed by `pack8`, bit for bit. Copies."""
    values = torch.empty(packed.columns, packed.depth, dtype=torch.int8)
    scales = torch.empty(packed.columns, -(-packed.depth // GROUP), dtype=torch.float32)
    packed.lib.emoe_unpack8(packed.data.data_ptr(), *_shape(packed), values.data_ptr(), scales.data_ptr())
    return values, scales


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """`F.linear` in bfloat16, with torch's number of threads: [..., K] -> [..., N]. Sums are in float32."""
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
