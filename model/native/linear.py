"""Matrices packed for the native library, and a linear layer."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from model.native.memory import allocate

_PANEL = 64
"""Columns of a panel, as in gemm.h."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Packed:
    """A bfloat16 matrix [columns, depth] (as nn.Linear has it) in panels; see gemm.h.

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

    @property
    def nbytes(self) -> int:
        """Of the matrix itself, without the padding of its last panel."""
        return self.columns * self.depth * 2


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
    columns, depth = weight.shape
    data, release = allocate(-(-columns // parts // _PANEL) * parts * _PANEL * depth * 2)
    lib.emoe_pack(weight.data_ptr(), columns, depth, parts, interleaved, data.data_ptr())
    packed = Packed(lib, data, columns, depth, parts, interleaved)
    weakref.finalize(packed, release).atexit = False
    return packed


def unpack(packed: Packed) -> Tensor:
    """The matrix that was packed, bit for bit. A copy."""
    weight = torch.empty(packed.columns, packed.depth, dtype=torch.bfloat16)
    shape = (packed.columns, packed.depth, packed.parts, packed.interleaved)
    packed.lib.emoe_unpack(packed.data.data_ptr(), *shape, weight.data_ptr())
    return weight


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
