"""The choice of experts in one kernel, after the product with the router's matrix.

Legend: T tokens of the step, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRouter:
    """Takes a softmax over a row's experts and its `top_k` largest values. Of equal values, the first expert comes
    first.
    """

    weight: Tensor
    """[E, H]"""
    top_k: int
    normalises: bool
    """Whether the chosen scores are scaled to add up to 1."""
    dtype: torch.dtype
    """The dtype of the scores."""

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what transformers' routers return: (logits [T, E], scores [T, K], experts [T, K])."""
        logits = F.linear(hidden_states.reshape(-1, self.weight.shape[1]), self.weight)
        tokens, experts = logits.shape
        scores = torch.empty(tokens, self.top_k, dtype=self.dtype, device=logits.device)
        index = torch.empty(tokens, self.top_k, dtype=torch.int64, device=logits.device)
        if tokens:
            _choose[(tokens,)](
                logits,
                scores,
                index,
                experts,
                NORMALISES=self.normalises,
                K=self.top_k,
                CHOICES=triton.next_power_of_2(self.top_k),
                BLOCK=triton.next_power_of_2(experts),
                num_warps=1 if experts <= 128 else 4,
            )
        return logits, scores, index


@triton.jit
def _choose(
    logits,
    scores,
    index,
    experts,
    NORMALISES: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    inside = expert < experts
    logit = tl.load(logits + token * experts + expert, mask=inside, other=float("-inf")).to(tl.float32)
    power = tl.where(inside, tl.exp(logit - tl.max(logit, 0)), 0.0)
    left = tl.where(inside, power / tl.sum(power, 0), -1.0)
    choice = tl.arange(0, CHOICES)
    best = tl.zeros((CHOICES,), dtype=tl.float32)
    chosen = tl.zeros((CHOICES,), dtype=tl.int32)
    for k in tl.static_range(K):
        value = tl.max(left, 0)
        # scores that are not numbers equal nothing; then any expert will do, and the row's logits say that it is spoilt
        first = tl.min(tl.where(left == value, expert, BLOCK), 0)
        first = tl.where(first < experts, first, k)
        best = tl.where(choice == k, value, best)
        chosen = tl.where(choice == k, first, chosen)
        left = tl.where(expert == first, -1.0, left)
    if NORMALISES:
        best = best / tl.sum(best, 0)
    tl.store(scores + token * K + choice, best.to(scores.dtype.element_ty), mask=choice < K)
    tl.store(index + token * K + choice, chosen.to(tl.int64), mask=choice < K)
