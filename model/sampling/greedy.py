"""Takes the most likely token of every row in one native call, where no row wants anything else.

That is the step of nearly every greedy request. By PyTorch's operators it takes a dozen calls, each of which finds its
code pushed out of the caches by the step's weights.

Legend: B rows (sequences), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic_moe.model.native import library
from elastic_moe.model.sampling.state import SamplingState

NO_TOKEN = -1
"""Stands for a token if the row's logits are not numbers, so that no token can be sampled."""


def all_most_likely(logits_BV: Tensor, states: Sequence[SamplingState]) -> list[int] | None:
    """The token of each row, or NO_TOKEN; None if a row wants more than its most likely token, or without native
    code."""
    if logits_BV.device.type != "cpu" or logits_BV.dtype not in (torch.bfloat16, torch.float32):
        return None
    if any(not state.greedy or state.params.logprobs is not None or state.adjusted for state in states):
        return None
    lib = library()
    if lib is None:
        return None
    logits_BV = logits_BV.contiguous()
    tokens_B = torch.empty(len(states), dtype=torch.int64)
    wide = logits_BV.dtype == torch.float32
    lib.emoe_most_likely(logits_BV.data_ptr(), wide, *logits_BV.shape, tokens_B.data_ptr())
    found: list[int] = tokens_B.tolist()
    return found
