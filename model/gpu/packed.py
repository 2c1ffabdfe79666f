"""Packed weights (model/experts/unpacking.py): kernels read their codes, scales and zero points where they lie.

A weight gets the bits that torch's operators give it: code, less the zero point, by scale in float32, rounded once to
the served dtype. Codes become numbers by arithmetic on their bits, so the compiler has to know no type of 8 bits.

Legend: S slots, A chosen slots, N outputs, K inputs, G groups of inputs; of a tile in kernels: O rows, I inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_moe.model.gpu.stacks import Stack

_WHOLE = tl.constexpr(0x4B000000)
"""The bits of 2^23 in float32. A whole number below 2^23 in place of the last bits adds itself."""
_WHOLE_VALUE = tl.constexpr(8388608.0)
_E4M3_UNIT = tl.constexpr(2.0**120)
"""The bits of E4M3 behind the sign, in place of float32's last bits of the exponent and first ones of the mantissa,
stand for so much less: the biases are 7 and 127. That is so for subnormal numbers too. Codes that are no number were
refused when they were read."""
_E2M1_UNIT = tl.constexpr(2.0**126)
"""The same for E2M1, whose bias is 1."""
_SMALLEST_POWER = tl.constexpr(2.0**-127)
"""Which E8M0 has as its byte 0. In float32 it is subnormal."""

_ROWS = 8
_INPUTS = 512


def unpack(stack: Stack, chosen_A: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The matrices of the chosen slots, or of all: [A, N, K]. The CPU waits for nothing."""
    count = len(stack.codes) if chosen_A is None else len(chosen_A)
    out = torch.empty(count, stack.outputs, stack.inputs, dtype=dtype, device=stack.codes.device)
    grid = (count * triton.cdiv(stack.outputs, _ROWS), triton.cdiv(stack.inputs, _INPUTS))
    if out.numel():
        _unpack[grid](
            *stack.memory,
            None if chosen_A is None else chosen_A.contiguous(),
            out,
            stack.outputs,
            stack.inputs,
            *stack.lengths,
            CODE=stack.code,
            GROUP=stack.group,
            ROWS=_ROWS,
            INPUTS=_INPUTS,
        )
    return out


@triton.jit
def read(
    codes,
    scales,
    more,
    row_O,
    inside_O,
    begin,
    code_length,
    scale_length,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """What lies in memory for INPUTS inputs of the rows `row_O`, which are int64: codes, scales, and zero points or
    scales of outputs."""
    PER_BYTE: tl.constexpr = 2 if CODE == "uint4" or CODE == "e2m1" or CODE == "nvfp4" else 1
    place = begin // PER_BYTE + tl.arange(0, INPUTS // PER_BYTE)
    here = inside_O[:, None] & (place < code_length)[None, :]
    code = tl.load(codes + row_O[:, None] * code_length + place[None, :], mask=here, other=0)
    group = begin // GROUP + tl.arange(0, INPUTS // GROUP)
    here = inside_O[:, None] & (group < scale_length)[None, :]
    scale = tl.load(scales + row_O[:, None] * scale_length + group[None, :], mask=here, other=0)
    other = scale
    if CODE == "uint4":
        length = (scale_length + 1) // 2
        zero = tl.load(more + row_O[:, None] * length + (group // 2)[None, :], mask=here, other=0)
        other = (zero.to(tl.int32) >> ((group & 1) * 4)[None, :]) & 15
    elif CODE == "nvfp4":
        other = tl.load(more + row_O, mask=inside_O, other=0.0)[:, None]
    return code, scale, other


@triton.jit
def weights(code, scale, other, CODE: tl.constexpr, GROUP: tl.constexpr):
    """The weights of the even and of the odd inputs of a tile that was read, before they are rounded: twice [O, I / 2]
    in float32."""
    rows: tl.constexpr = code.shape[0]
    if CODE == "uint4" or CODE == "e2m1" or CODE == "nvfp4":
        even, odd = code.to(tl.int32), code.to(tl.int32)
    else:
        even, odd = tl.split(tl.reshape(code, (rows, code.shape[1] // 2, 2)))
    half: tl.constexpr = even.shape[1]
    even = tl.reshape(even, (rows, half // (GROUP // 2), GROUP // 2)).to(tl.int32)
    odd = tl.reshape(odd, (rows, half // (GROUP // 2), GROUP // 2)).to(tl.int32)
    if CODE == "nvfp4":
        bits = scale.to(tl.int32)
        factor = (((bits & 128) << 24) | ((bits & 127) << 20)).to(tl.float32, bitcast=True) * _E4M3_UNIT * other
    elif scale.dtype == tl.uint8:
        power = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        factor = tl.where(scale == 0, _SMALLEST_POWER, power)
    else:
        factor = scale.to(tl.float32)
    factor = factor[:, :, None]
    if CODE == "uint4":
        # the odd code counts 16 times where it is, and its scale a 16th
        nought = other.to(tl.float32)[:, :, None]
        even = ((even & 15) | _WHOLE).to(tl.float32, bitcast=True) - (_WHOLE_VALUE + nought)
        odd = ((odd & 240) | _WHOLE).to(tl.float32, bitcast=True) - (_WHOLE_VALUE + nought * 16.0)
        even, odd = even * factor, odd * (factor * 0.0625)
    elif CODE == "e2m1" or CODE == "nvfp4":
        UNIT: tl.constexpr = _E2M1_UNIT * 2.0 if CODE == "e2m1" else _E2M1_UNIT
        even = (((even & 8) << 28) | ((even & 7) << 22)).to(tl.float32, bitcast=True) * UNIT * factor
        odd = (((odd & 128) << 24) | ((odd & 112) << 18)).to(tl.float32, bitcast=True) * UNIT * factor
    elif CODE == "e4m3":
        even = (((even & 128) << 24) | ((even & 127) << 20)).to(tl.float32, bitcast=True) * _E4M3_UNIT * factor
        odd = (((odd & 128) << 24) | ((odd & 127) << 20)).to(tl.float32, bitcast=True) * _E4M3_UNIT * factor
    else:
        even = (((even & 255) ^ 128) | _WHOLE).to(tl.float32, bitcast=True) - (_WHOLE_VALUE + 128.0)
        odd = (((odd & 255) ^ 128) | _WHOLE).to(tl.float32, bitcast=True) - (_WHOLE_VALUE + 128.0)
        even, odd = even * factor, odd * factor
    return tl.reshape(even, (rows, half)), tl.reshape(odd, (rows, half))


@triton.jit
def joined(even, odd):
    """[O, I] from twice [O, I / 2]."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1] * 2))


@triton.jit
def rounded(even, odd):
    """Round numbers to bfloat16, in float32. GPUs round two in one instruction if both go into one word."""
    low = even.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = odd.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    both = low | (high << 16)
    return (both << 16).to(tl.float32, bitcast=True), (both & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _unpack(
    codes,
    scales,
    more,
    chosen,
    out,
    outputs,
    inputs,
    code_length,
    scale_length,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    parts = tl.cdiv(outputs, ROWS)
    matrix = (tl.program_id(0) // parts).to(tl.int64)
    output = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    slot = matrix if chosen is None else tl.load(chosen + matrix)
    begin = tl.program_id(1) * INPUTS
    code, scale, other = read(
        codes,
        scales,
        more,
        slot * outputs + output,
        output < outputs,
        begin,
        code_length,
        scale_length,
        CODE,
        GROUP,
        INPUTS,
    )
    even, odd = weights(code, scale, other, CODE, GROUP)
    tile = joined(even, odd).to(out.dtype.element_ty)
    column = begin + tl.arange(0, INPUTS)
    here = (output < outputs)[:, None] & (column < inputs)[None, :]
    tl.store(out + (matrix * outputs + output)[:, None] * inputs + column[None, :], tile, mask=here)
