"""Chooses the experts of each token in one call: see router.cpp.

Legend: T tokens of the step, E experts, K experts per token.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

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
        logits = torch.empty(rows, self.packed.columns, dtype=torch.bfloat16)
        # the dtype is given, since another thread that loads a model changes the process's default dtype for a while
        scores = torch.empty(rows, self.top_k, dtype=torch.float32)
        index = torch.empty(rows, self.top_k, dtype=torch.int64)
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
