"""Gives kernels of model/gpu/ to the small operators of a trunk on a GPU, which torch computes in many kernels each.

A module is recognised by what it computes, as in small_ops.py. It must compute in bfloat16.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.fitting.small_ops import find_norm, find_router, turns_halves
from elastic_moe.model.transformers_private import replace_rotary_function, rotary_function


@torch.inference_mode()
def fit_gpu_trunk(trunk: nn.Module, notes: FitNotes) -> None:
    """Give kernels to the norms, routers and rotary embeddings of a trunk. `notes` gets all of them."""
    for module in trunk.modules():
        _fit_norm(module, notes)
        _fit_router(module, notes)
    for name in sorted({type(module).__module__ for module in trunk.modules()}):
        _fit_rotary(sys.modules[name], notes)


def _fit_norm(module: nn.Module, notes: FitNotes) -> None:
    from elastic_moe.model.gpu.rows import GpuNorm  # Triton, which it needs, is there only on GPUs

    found = find_norm(module)
    kind = type(module).__name__
    if not isinstance(found, str):
        module.forward = GpuNorm(weight=found.weight, epsilon=found.epsilon, rounds=found.rounds)
        notes.add(Part.NORMS, kind, CodePath.TRITON)
    elif "norm" in kind.lower():
        # the name decides only whether the report mentions the module
        notes.add(Part.NORMS, kind, CodePath.TRANSFORMERS, found)


def _fit_router(module: nn.Module, notes: FitNotes) -> None:
    from elastic_moe.model.gpu.router import GpuRouter  # as above

    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or weight.dim() != 2 or isinstance(module, nn.Linear | nn.Embedding):
        return
    matrix = weight.detach()

    def make(top_k: int, normalises: bool, dtype: torch.dtype) -> GpuRouter:
        return GpuRouter(weight=matrix, top_k=top_k, normalises=normalises, dtype=dtype)

    found = find_router(module, matrix.shape[0], matrix.shape[1], make, matrix.device)
    if isinstance(found, str):
        notes.add(Part.ROUTER, type(module).__name__, CodePath.TRANSFORMERS, found)
        return
    module.forward = found
    notes.add(Part.ROUTER, type(module).__name__, CodePath.TRITON)


def _fit_rotary(module: Any, notes: FitNotes) -> None:
    """Replace a modelling file's rotary function by one that is one kernel for q and k."""
    from elastic_moe.model.gpu.rows import rotate  # as above

    original = rotary_function(module)
    if original is None:
        return
    file = module.__name__.rpartition(".")[2]
    replaced = hasattr(original, "emoe_original")
    if not replaced and not turns_halves(original):
        notes.add(Part.ROTARY, file, CodePath.TRANSFORMERS, "it does not turn halves of a head against each other")
        return
    notes.add(Part.ROTARY, file, CodePath.TRITON)
    if replaced:
        return

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _fits(q, k, cos, sin):
            return original(q, k, cos, sin, *args, **kwargs)
        return rotate(q, k, cos, sin)

    apply_rotary_pos_emb.emoe_original = original  # type: ignore[attr-defined]
    replace_rotary_function(module, apply_rotary_pos_emb)


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether q and k are [1, heads, T, size] and cosines and sines [1, T, size], all of them bfloat16 on a GPU."""
    return all(
        x.dtype == cos.dtype == sin.dtype == torch.bfloat16
        and x.device.type == "cuda"
        and x.dim() == 4
        and x.shape[0] == 1
        and x.stride(3) == 1
        and cos.shape == sin.shape == (1, x.shape[2], x.shape[3])
        and cos.is_contiguous()
        and sin.is_contiguous()
        for x in (q, k)
    )
