"""Gives kernels of model/gpu/ to the small operators of a trunk on a GPU, which torch computes in many kernels each.

A module is recognised by what it computes, as in small_ops.py. It must compute in bfloat16.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.fitting.small_ops import find_router
from elastic_moe.model.operators.norms import fit_norm
from elastic_moe.model.operators.rotary import fit_rotary


@torch.inference_mode()
def fit_gpu_trunk(trunk: nn.Module, notes: FitNotes) -> None:
    """Give kernels to the norms, routers and rotary embeddings of a trunk. `notes` gets all of them."""
    from elastic_moe.model.gpu.rows import GpuNorm, rotate  # Triton, which it needs, is there only on GPUs

    for module in trunk.modules():
        fit_norm(module, GpuNorm, CodePath.TRITON, notes)
        _fit_router(module, notes)
    for name in sorted({type(module).__module__ for module in trunk.modules()}):
        fit_rotary(sys.modules[name], "cuda", rotate, CodePath.TRITON, notes)


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
