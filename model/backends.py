"""Which code computes what, by device and dtype: the one place where it is chosen.

    experts     CPU: native library or PyTorch expert by expert (cpu_experts.py); GPU: stacked_experts.py
    attention   CPU, bfloat16: native library; GPU, 16 bits: FlashAttention (flash.py); else matmul (attention.py)
    dispatch    how many tokens in a step go from everyone to everyone (dispatch.py)

Trunks are fitted to CPUs in model/surgery.py, workers joined to groups in model/groups.py.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from model.cpu_experts import CpuExperts, no_int8
from model.layer_experts import LayerExperts
from model.stacked_experts import StackedExperts

_DENSE_TOKENS_CPU, _DENSE_TOKENS_GPU = 64, 8192


def layer_experts(module: nn.Module, *, int8: bool) -> LayerExperts:
    """What holds and computes a layer's experts. `module` is the trunk's expert module, empty of weights.

    Raises UserError where int8 was asked for and is not to be had.
    """
    like = next(itertools.chain(module.parameters(), module.buffers()))
    if like.device.type == "cpu":
        return CpuExperts(module, int8=int8)
    if int8:
        raise no_int8("it is for CPUs")
    return StackedExperts(module)


def dense_tokens(device: torch.device) -> int:
    """Up to so many tokens in the whole step, everything to everyone is cheaper than choosing rows and telling sizes.

    On GPUs choosing makes the host wait twice per layer, and most tokens want an expert on most workers anyway.
    """
    return _DENSE_TOKENS_CPU if device.type == "cpu" else _DENSE_TOKENS_GPU
