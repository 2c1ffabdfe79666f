"""Chooses the experts of each token in one call: see router.cpp.

Legend: T tokens of the step, E experts, K experts per token.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe.model.native.block import Norm
from elastic_moe.model.native.linear import Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Takes a softmax over a row's experts and its `top_k` largest values. Of equal values, the first expert comes
    first.
    """

    lib: ctypes.CDLL
    packed: Packed
    bias: Tensor | None = None
    """[E], added to the logits."""
    top_k: int
    normalises: bool
    """Whether the chosen scores are scaled to add up to 1."""
    dtype: torch.dtype
    """The dtype of the scores."""

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what transformers' routers return: (logits [T, E], scores [T, K], experts [T, K])."""
        x = hidden_states.reshape(-1, self.packed.depth).contiguous()
        rows = len(x)
        logits, scores, index = _outputs(rows, self.packed.columns, self.top_k, torch.bfloat16)
        self.lib.emoe_route(
            x.data_ptr(),
            rows,
            self.packed.depth,
            self.packed.data.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            self.packed.columns,
            self.top_k,
            self.normalises,
            logits.data_ptr(),
            scores.data_ptr(),
            index.data_ptr(),
            torch.get_num_threads(),
        )
        return logits, scores.to(self.dtype), index


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How a router makes scores of logits, and chooses by them."""

    logistic: bool
    """Whether a score is the logistic function of its logit, and not a softmax over the row."""
    groups: int = 1
    """Experts form so many groups of equal size, which follow one another."""
    top_groups: int = 1
    """Experts are chosen in so many groups, those with the largest sum of their `best` largest values."""
    best: int = 1
    normalises: bool = False
    """Whether the chosen scores are scaled to add up to 1."""
    scale: float = 1.0
    """By which scores are multiplied at last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRouter:
    """Chooses experts by their scores and a bias, in the best groups. It resolves ties as torch.topk does."""

    lib: ctypes.CDLL
    packed: Packed
    wide: bool
    """Whether logits are in float32, and not rounded to bfloat16."""
    logits_dtype: torch.dtype
    scoring: Scoring
    bias: Tensor | None = None
    """[E] float32, added to scores before the choice, unless the caller gives one."""
    top_k: int
    dtype: torch.dtype
    """The dtype of the scores."""

    def __call__(self, hidden_states: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what transformers' routers return: (logits [T, E], scores [T, K], experts [T, K])."""
        x = hidden_states.reshape(-1, self.packed.depth).contiguous()
        rows, how = len(x), self.scoring
        added = self.bias if bias is None else bias.float().contiguous()
        logits, scores, index = _outputs(rows, self.packed.columns, self.top_k, torch.float32)
        self.lib.emoe_route_scored(
            x.data_ptr(),
            rows,
            self.packed.depth,
            self.packed.data.data_ptr(),
            self.packed.columns,
            self.wide,
            how.logistic,
            None if added is None else added.data_ptr(),
            how.groups,
            how.top_groups,
            how.best,
            self.top_k,
            how.normalises,
            how.scale,
            logits.data_ptr(),
            scores.data_ptr(),
            index.data_ptr(),
            torch.get_num_threads(),
        )
        return logits.to(self.logits_dtype), scores.to(self.dtype), index


@dataclass(frozen=True, slots=True, kw_only=True)
class NormedRouter:
    """A router that normalises its rows itself, and whose scores are scaled expert by expert."""

    router: ScoredRouter
    norm: Norm
    columns: Tensor
    """[H] bfloat16, by which normalised rows are multiplied."""
    factor: float
    """By which they are multiplied then."""
    scales: Tensor
    """[E] float32, by which the scores are multiplied at last."""

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (probabilities [T, E], scores [T, K], experts [T, K])."""
        logits, scores, index = self.router(self.norm(hidden_states) * self.columns * self.factor)
        return logits.float().softmax(-1), scores * self.scales[index], index


def _outputs(rows: int, experts: int, top_k: int, logits_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Room for (logits [T, E], scores [T, K], experts [T, K])."""
    # the dtypes are given, since another thread that loads a model changes the process's default dtype for a while
    logits = torch.empty(rows, experts, dtype=logits_dtype)
    return logits, torch.empty(rows, top_k, dtype=torch.float32), torch.empty(rows, top_k, dtype=torch.int64)
