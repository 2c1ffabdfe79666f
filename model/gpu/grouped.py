"""The grouped product of packed experts with some rows each: weights are unpacked in registers, and multiplied at once.

A grouped product of torch needs unpacked weights in memory, which are written and read again: with few rows of each
expert that takes several times as long as reading the packed ones. Here they are unpacked again for every _ROWS rows of
an expert, so with many rows of each, unpacking them once is faster.

Legend: N rows, sorted by slot, I inputs, O outputs, S slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_moe.model.gpu.packed import joined, read, weights
from elastic_moe.model.gpu.stacks import Stack

_ROWS = 32
"""Rows of an expert that a program takes at a time."""
MOST_ROWS = _ROWS
"""Most rows of a slot, in the mean over all, that are multiplied so."""
_OUTPUTS = 64
_INPUTS = 128
"""Inputs that a program takes at a time: a power of 2, and a multiple of every group."""


def grouped(x_NI: Tensor, stack: Stack, end_S: Tensor) -> Tensor:
    """Multiply rows before end_S[0] by the first matrix, rows before end_S[1] by the second, and so on: [N, O].

    Rows past the last end are not written. The CPU waits for nothing.
    """
    out = torch.empty(len(x_NI), stack.outputs, dtype=x_NI.dtype, device=x_NI.device)
    _multiply[(triton.cdiv(stack.outputs, _OUTPUTS), len(end_S))](
        x_NI.contiguous(),
        *stack.memory,
        end_S,
        out,
        stack.outputs,
        stack.inputs,
        *stack.lengths,
        CODE=stack.code,
        GROUP=stack.group,
        ROWS=_ROWS,
        OUTPUTS=_OUTPUTS,
        INPUTS=_INPUTS,
        num_stages=4,
        # three programs share a multiprocessor
        maxnreg=168,
    )
    return out


@triton.jit
def _multiply(
    x,
    codes,
    scales,
    more,
    end,
    out,
    outputs,
    inputs,
    code_length,
    scale_length,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    slot = tl.program_id(1)
    first_row = tl.load(end + slot - 1, mask=slot > 0, other=0)
    last_row = tl.load(end + slot)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < outputs
    line = slot.to(tl.int64) * outputs + output
    for begin_row in range(first_row, last_row, ROWS):
        row = begin_row + tl.arange(0, ROWS)
        there = row < last_row
        place = row.to(tl.int64)
        sums = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
        for begin in range(0, inputs, INPUTS):
            column = begin + tl.arange(0, INPUTS)
            here = there[:, None] & (column < inputs)[None, :]
            numbers = tl.load(x + place[:, None] * inputs + column[None, :], mask=here, other=0.0)
            code, scale, other = read(
                codes, scales, more, line, inside, begin, code_length, scale_length, CODE, GROUP, INPUTS
            )
            even, odd = weights(code, scale, other, CODE, GROUP)
            sums = tl.dot(joined(even, odd).to(x.dtype.element_ty), tl.trans(numbers), sums)
        here = there[:, None] & inside[None, :]
        tl.store(out + place[:, None] * outputs + output[None, :], tl.trans(sums).to(x.dtype.element_ty), mask=here)
