"""Experts of few rows: every pair of a row and a choice is multiplied by its expert's matrices on its own.

A grouped product works on tiles of many rows, and needs a few kernels more to prepare it. With few pairs the time is
that of reading the experts, which these kernels do with all multiprocessors. Pairs that share an expert find it in the
cache.

Legend: R rows, K experts per token, N = R * K pairs, H hidden, F expert width, S slots, X = logical experts + 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_moe.model.gpu.pairs import gather_sum

MOST_PAIRS = 64
"""Most pairs that are multiplied one by one."""

_OUTPUTS = 8
"""Outputs of a program."""
_INPUTS = 512
"""Inputs that a program takes at a time."""


def run_few(
    gate_up_S2FH: Tensor, down_SHF: Tensor, slot_X: Tensor, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor
) -> Tensor:
    """Run rows through experts with the gate silu(gate) * up, and add up by weight: [R, H].

    `slot_X` as in pairs.places; choices without a slot are left out. Sums are in float32, in the order of the choices.
    """
    pairs, choices = index_RK.numel(), index_RK.shape[1]
    slots, hidden, width = down_SHF.shape
    gated_NF = torch.empty(pairs, width, dtype=x_RH.dtype, device=x_RH.device)
    y_NH = torch.empty(pairs, hidden, dtype=x_RH.dtype, device=x_RH.device)
    place_N = torch.empty(pairs, dtype=torch.int64, device=x_RH.device)
    index_RK = index_RK.contiguous()
    _gate_up[(pairs, triton.cdiv(width, _OUTPUTS))](
        x_RH.contiguous(),
        gate_up_S2FH,
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
        OUTPUTS=_OUTPUTS,
        INPUTS=_INPUTS,
    )
    _down[(pairs, triton.cdiv(hidden, _OUTPUTS))](
        gated_NF,
        down_SHF,
        slot_X,
        index_RK,
        y_NH,
        len(slot_X),
        slots,
        hidden,
        width,
        OUTPUTS=_OUTPUTS,
        INPUTS=_INPUTS,
    )
    return gather_sum(y_NH, place_N, None, weight_RK)


@triton.jit
def _dot(row, matrix, output, outputs, inputs, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """Sums of products of a row with the rows `output` of a matrix, in float32."""
    total = tl.zeros((OUTPUTS, INPUTS), dtype=tl.float32)
    line = output.to(tl.int64)[:, None] * inputs
    for begin in range(0, inputs, INPUTS):
        column = begin + tl.arange(0, INPUTS)
        inside = column < inputs
        numbers = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
        here = (output < outputs)[:, None] & inside[None, :]
        factors = tl.load(matrix + line + column[None, :], mask=here, other=0.0).to(tl.float32)
        total += factors * numbers[None, :]
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["pairs"])
def _gate_up(
    x,
    matrices,
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
        row = x + pair // choices * hidden
        gates = matrices + slot * 2 * width * hidden
        gate = _dot(row, gates, output, width, hidden, OUTPUTS, INPUTS)
        up = _dot(row, gates + width.to(tl.int64) * hidden, output, width, hidden, OUTPUTS, INPUTS)
        gate = gate.to(tl.bfloat16).to(tl.float32)
        activated = (gate / (1.0 + tl.exp(-gate))).to(tl.bfloat16).to(tl.float32)
        gated = (activated * up.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16)
        tl.store(out + pair * width + output, gated, mask=output < width)


@triton.jit
def _down(
    gated,
    matrices,
    slot_X,
    index,
    out,
    entries,
    slots,
    hidden,
    width,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(index + pair)
    slot = tl.load(slot_X + tl.where(expert < 0, entries - 1, expert))
    if slot < slots:
        output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        sums = _dot(gated + pair * width, matrices + slot * hidden * width, output, hidden, width, OUTPUTS, INPUTS)
        tl.store(out + pair * hidden + output, sums.to(tl.bfloat16), mask=output < hidden)
