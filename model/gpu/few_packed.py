"""Packed experts of few rows, as few.py has unpacked ones: their weights are in registers alone (packed.py).

The kernels of few.py stay as they were measured. These ask for all that they read before they unpack any of it, and add
the same products in another order.

Legend: R rows, K experts per token, N = R * K pairs, H hidden, F expert width, S slots, X = logical experts + 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_moe.model.gpu.packed import joined, read, rounded, weights
from elastic_moe.model.gpu.pairs import gather_sum
from elastic_moe.model.gpu.stacks import Stack

_OUTPUTS = 8
"""Outputs of a program."""
_INPUTS = 512
"""Inputs that a program takes at a time: a power of 2, and a multiple of every group."""
_OPTIONS = {"num_warps": 8, "maxnreg": 80}
"""Of the kernel that keeps two tiles of packed weights in registers: as many programs as this lets a multiprocessor run
ask for enough bytes at a time."""


def run_few(
    gate_up_S2FH: Stack, down_SHF: Stack, slot_X: Tensor, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor
) -> Tensor:
    """Run rows through experts with the gate silu(gate) * up, and add up by weight: [R, H].

    `slot_X` as in pairs.places; choices without a slot are left out. Sums are in float32, in the order of the choices.
    """
    pairs, choices = index_RK.numel(), index_RK.shape[1]
    slots, hidden, width = len(down_SHF.codes), down_SHF.outputs, down_SHF.inputs
    gated_NF = torch.empty(pairs, width, dtype=x_RH.dtype, device=x_RH.device)
    y_NH = torch.empty(pairs, hidden, dtype=x_RH.dtype, device=x_RH.device)
    place_N = torch.empty(pairs, dtype=torch.int64, device=x_RH.device)
    index_RK = index_RK.contiguous()
    _gate_up[(pairs, triton.cdiv(width, _OUTPUTS))](
        x_RH.contiguous(),
        *gate_up_S2FH.memory,
        slot_X,
        index_RK,
        gated_NF,
        place_N,
        len(slot_X),
        slots,
        pairs,
        choices,
        hidden,
        width,
        *gate_up_S2FH.lengths,
        CODE=gate_up_S2FH.code,
        GROUP=gate_up_S2FH.group,
        OUTPUTS=_OUTPUTS,
        INPUTS=_INPUTS,
        **_OPTIONS,
    )
    _down[(pairs, triton.cdiv(hidden, _OUTPUTS))](
        gated_NF,
        *down_SHF.memory,
        slot_X,
        index_RK,
        y_NH,
        len(slot_X),
        slots,
        hidden,
        width,
        *down_SHF.lengths,
        CODE=down_SHF.code,
        GROUP=down_SHF.group,
        OUTPUTS=_OUTPUTS,
        INPUTS=_INPUTS,
    )
    return gather_sum(y_NH, place_N, None, weight_RK)


@triton.jit
def _factors(code, scale, other, CODE: tl.constexpr, GROUP: tl.constexpr):
    """The weights of a tile, as bfloat16 has them, in float32."""
    even, odd = weights(code, scale, other, CODE, GROUP)
    even, odd = rounded(even, odd)
    return joined(even, odd)


@triton.jit(do_not_specialize=["pairs"])
def _gate_up(
    x,
    codes,
    scales,
    more,
    slot_X,
    index,
    out,
    place,
    entries,
    slots,
    pairs,
    choices,
    hidden,
    width,
    code_length,
    scale_length,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    expert = tl.load(index + pair)
    slot = tl.load(slot_X + tl.where(expert < 0, entries - 1, expert))
    if part == 0:
        # a place beyond all pairs says that the pair was not computed
        tl.store(place + pair, tl.where(slot < slots, pair, pairs))
    if slot < slots:
        output = part * OUTPUTS + tl.arange(0, OUTPUTS)
        inside = output < width
        row = x + pair // choices * hidden
        first = slot * 2 * width + output
        gates = tl.zeros((OUTPUTS, INPUTS), dtype=tl.float32)
        ups = tl.zeros((OUTPUTS, INPUTS), dtype=tl.float32)
        for begin in range(0, hidden, INPUTS):
            column = begin + tl.arange(0, INPUTS)
            numbers = tl.load(row + column, mask=column < hidden, other=0.0).to(tl.float32)[None, :]
            # all that is read is asked for before any of it is used
            gate, gate_scale, gate_more = read(
                codes, scales, more, first, inside, begin, code_length, scale_length, CODE, GROUP, INPUTS
            )
            up, up_scale, up_more = read(
                codes, scales, more, first + width, inside, begin, code_length, scale_length, CODE, GROUP, INPUTS
            )
            gates += _factors(gate, gate_scale, gate_more, CODE, GROUP) * numbers
            ups += _factors(up, up_scale, up_more, CODE, GROUP) * numbers
        gate_sum = tl.sum(gates, 1).to(tl.bfloat16).to(tl.float32)
        up_sum = tl.sum(ups, 1).to(tl.bfloat16).to(tl.float32)
        activated = (gate_sum / (1.0 + tl.exp(-gate_sum))).to(tl.bfloat16).to(tl.float32)
        tl.store(out + pair * width + output, (activated * up_sum).to(tl.bfloat16), mask=inside)


@triton.jit
def _down(
    gated,
    codes,
    scales,
    more,
    slot_X,
    index,
    out,
    entries,
    slots,
    hidden,
    width,
    code_length,
    scale_length,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(index + pair)
    slot = tl.load(slot_X + tl.where(expert < 0, entries - 1, expert))
    if slot < slots:
        output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        inside = output < hidden
        row, first = gated + pair * width, slot * hidden + output
        total = tl.zeros((OUTPUTS, INPUTS), dtype=tl.float32)
        for begin in range(0, width, INPUTS):
            column = begin + tl.arange(0, INPUTS)
            numbers = tl.load(row + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
            code, scale, other = read(
                codes,
                scales,
                more,
                first,
                inside,
                begin,
                code_length,
                scale_length,
                CODE,
                GROUP,
                INPUTS,
            )
            total += _factors(code, scale, other, CODE, GROUP) * numbers
        tl.store(out + pair * hidden + output, tl.sum(total, 1).to(tl.bfloat16), mask=inside)
