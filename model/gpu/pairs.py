"""Brings rows to the order of their experts, and adds up what the experts return.

A pair is a row with one of its choices; the pair of row r and choice k has the number r * K + k.

Legend: R rows, K experts per token, N = R * K pairs, H hidden, S slots of experts, X = logical experts + 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COUNTED = 2048
"""Most pairs whose places are counted, which takes a time that grows with their square. More pairs are sorted."""

_PART = 32
_TILE = 128


def places(slot_X: Tensor, index_RK: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """([N] the place of each pair in the stable order of their slots, [S] where the pairs of each slot end).

    `slot_X` is the slot of each logical expert, `size` if it has none; its last entry is for the index -1. Pairs
    without a slot come last.
    """
    pairs = index_RK.numel()
    place_N = torch.empty(pairs, dtype=torch.int64, device=index_RK.device)
    end_S = torch.empty(size, dtype=torch.int32, device=index_RK.device)
    if pairs > MOST_COUNTED:
        slot_N = slot_X[index_RK.reshape(-1).long()]
        sorted_N, order_N = slot_N.sort(stable=True)
        place_N[order_N] = torch.arange(pairs, device=order_N.device)
        number_S = torch.arange(size, device=order_N.device)
        return place_N, torch.searchsorted(sorted_N, number_S, right=True, out_int32=True)
    parts = triton.cdiv(pairs, _PART)
    _count[(max(parts, triton.cdiv(size, _PART)),)](
        slot_X, len(slot_X), index_RK.contiguous(), place_N, end_S, pairs, size, PART=_PART, TILE=_TILE
    )
    return place_N, end_S


@triton.jit(do_not_specialize=["pairs"])
def _count(slot_X, entries, index, place, end, pairs, size, PART: tl.constexpr, TILE: tl.constexpr):
    mine = tl.program_id(0) * PART + tl.arange(0, PART)
    expert = tl.load(index + mine, mask=mine < pairs, other=0)
    slot = tl.load(slot_X + tl.where(expert < 0, entries - 1, expert), mask=mine < pairs, other=0)
    before = tl.zeros((PART,), dtype=tl.int32)
    until = tl.zeros((PART,), dtype=tl.int32)
    for begin in range(0, pairs, TILE):
        other = begin + tl.arange(0, TILE)
        there = other < pairs
        their_expert = tl.load(index + other, mask=there, other=0)
        their_slot = tl.load(slot_X + tl.where(their_expert < 0, entries - 1, their_expert), mask=there, other=0)
        earlier = (their_slot[None, :] < slot[:, None]) | (
            (their_slot[None, :] == slot[:, None]) & (other[None, :] < mine[:, None])
        )
        before += tl.sum((earlier & there[None, :]).to(tl.int32), 1)
        # the programs count for the slots of their own numbers too
        until += tl.sum(((their_slot[None, :] <= mine[:, None]) & there[None, :]).to(tl.int32), 1)
    tl.store(place + mine, before.to(tl.int64), mask=mine < pairs)
    tl.store(end + mine, until, mask=mine < size)


def spread(x_RH: Tensor, place_N: Tensor, choices: int) -> Tensor:
    """Copy each row to the places of its pairs: [N, H]."""
    x_RH = x_RH.contiguous()
    rows, width = x_RH.shape
    out = torch.empty(len(place_N), width, dtype=x_RH.dtype, device=x_RH.device)
    block = min(4096, triton.next_power_of_2(width))
    _spread[(rows, triton.cdiv(width, block))](x_RH, place_N, out, width, choices, BLOCK=block)
    return out


@triton.jit
def _spread(x, place, out, width, choices, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    numbers = tl.load(x + row * width + column, mask=inside)
    for k in range(choices):
        tl.store(out + tl.load(place + row * choices + k) * width + column, numbers, mask=inside)


def gather_sum(y_NH: Tensor, place_N: Tensor, end_S: Tensor | None, weight_RK: Tensor) -> Tensor:
    """Add up each row's pairs by weight, in the order of its choices and in float32: [R, H] in the dtype of `y_NH`.

    Pairs whose place is at or after the last of `end_S`, or after the last row of `y_NH`, count nothing: they were not
    computed, so their rows hold whatever was in memory, even NaN.
    """
    rows, choices = weight_RK.shape
    width = y_NH.shape[1]
    out = torch.empty(rows, width, dtype=y_NH.dtype, device=y_NH.device)
    block = min(1024, triton.next_power_of_2(width))
    _gather_sum[(rows, triton.cdiv(width, block))](
        y_NH,
        place_N,
        place_N if end_S is None else end_S[-1:],
        weight_RK.contiguous(),
        out,
        len(y_NH),
        width,
        choices,
        ENDS=end_S is not None,
        BLOCK=block,
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _gather_sum(y, place, computed, weight, out, rows, width, choices, ENDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    count = tl.load(computed).to(tl.int64) if ENDS else rows.to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(choices):
        at = tl.load(place + row * choices + k)
        factor = tl.load(weight + row * choices + k).to(tl.float32)
        numbers = tl.load(y + at * width + column, mask=inside & (at < count), other=0.0).to(tl.float32)
        total += numbers * factor
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)
