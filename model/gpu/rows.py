"""Kernels that take rows of numbers: root mean square norms, rotary embeddings, gates.

They round to bfloat16 where transformers' operators do, so that their results differ by no more than the order of a
sum.

Legend: T tokens, N heads, D head size, H width of a row, R rows, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_moe.model.rms_norm import RmsNorm

_HEADS = 8
"""Heads that a program turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuNorm:
    """Computes `formula` in one kernel."""

    formula: RmsNorm

    def __call__(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.contiguous()
        out = torch.empty_like(x)
        formula = self.formula
        width = len(formula.weight)
        rows = x.numel() // width
        block = triton.next_power_of_2(width)
        # narrow rows, such as those of heads, share a program
        together = max(1, min(16, 2048 // block))
        if rows:
            _norm[(triton.cdiv(rows, together),)](
                x, formula.weight, out, rows, width, formula.epsilon, ROUNDS=formula.rounds, ROWS=together, BLOCK=block
            )
        return out


@triton.jit(do_not_specialize=["rows"])
def _norm(x, weight, out, rows, width, epsilon, ROUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    here = (row[:, None] < rows) & (column[None, :] < width)
    place = row[:, None].to(tl.int64) * width + column[None, :]
    wide = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
    share = tl.sum(wide * wide, 1) / width
    wide = wide * (1.0 / tl.sqrt_rn(share + epsilon))[:, None]
    if ROUNDS:
        wide = wide.to(tl.bfloat16).to(tl.float32)
    factor = tl.load(weight + column, mask=column < width, other=0.0)
    tl.store(out + place, (wide * factor[None, :]).to(tl.bfloat16), mask=here)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the halves of heads against each other: q [1, N, T, D], k [1, G, T, D], cos and sin [1, T, D].

    The results have the layout [T, heads, D].
    """
    tokens, size = q.shape[2], q.shape[3]
    outs = [torch.empty(1, tokens, x.shape[1], size, dtype=x.dtype, device=x.device) for x in (q, k)]
    heads = q.shape[1] + k.shape[1]
    if tokens:
        strides: list[Any] = [stride for x in (q, k) for stride in (x.stride(1), x.stride(2))]
        _rotate[(tokens, triton.cdiv(heads, _HEADS))](
            q,
            k,
            cos,
            sin,
            *outs,
            *strides,
            q.shape[1],
            k.shape[1],
            HALF=size // 2,
            HEADS=_HEADS,
            BLOCK=triton.next_power_of_2(size // 2),
        )
    return outs[0].transpose(1, 2), outs[1].transpose(1, 2)


@triton.jit
def _rotate(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    q_head,
    q_token,
    k_head,
    k_token,
    q_heads,
    k_heads,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < HALF
    angle = token * (2 * HALF) + column
    cos_1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    is_q = (head < q_heads) & inside
    is_k = (head >= q_heads) & (head < q_heads + k_heads) & inside
    from_q = q + head * q_head + token * q_token + column
    from_k = k + (head - q_heads) * k_head + token * k_token + column
    first = tl.load(from_q, mask=is_q, other=0.0).to(tl.float32) + tl.load(from_k, mask=is_k, other=0.0).to(tl.float32)
    second = tl.load(from_q + HALF, mask=is_q, other=0.0).to(tl.float32) + tl.load(
        from_k + HALF, mask=is_k, other=0.0
    ).to(tl.float32)
    turned_1 = (first * cos_1).to(tl.bfloat16).to(tl.float32) - (second * sin_1).to(tl.bfloat16).to(tl.float32)
    turned_2 = (second * cos_2).to(tl.bfloat16).to(tl.float32) + (first * sin_2).to(tl.bfloat16).to(tl.float32)
    to_q = q_out + (token * q_heads + head) * (2 * HALF) + column
    to_k = k_out + (token * k_heads + head - q_heads) * (2 * HALF) + column
    tl.store(to_q, turned_1.to(tl.bfloat16), mask=is_q)
    tl.store(to_q + HALF, turned_2.to(tl.bfloat16), mask=is_q)
    tl.store(to_k, turned_1.to(tl.bfloat16), mask=is_k)
    tl.store(to_k + HALF, turned_2.to(tl.bfloat16), mask=is_k)


def silu_gate(hidden_NF: Tensor) -> Tensor:
    """silu(first half) * second half of rows [R, 2F]: [R, F]."""
    rows, width = hidden_NF.shape[0], hidden_NF.shape[1] // 2
    out = torch.empty(rows, width, dtype=hidden_NF.dtype, device=hidden_NF.device)
    block = min(2048, triton.next_power_of_2(width))
    if rows:
        _silu_gate[(rows, triton.cdiv(width, block))](hidden_NF, out, width, hidden_NF.stride(0), BLOCK=block)
    return out


@triton.jit
def _silu_gate(hidden, out, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(hidden + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(tl.bfloat16).to(tl.float32)
    tl.store(out + row * width + column, (activated * up).to(tl.bfloat16), mask=inside)
