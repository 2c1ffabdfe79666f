"""Gives the trunk's small operators native code, or kernels on a GPU: transformers computes each of them with several
operators of torch.

A module is recognised by what it computes on random input and not by its name: families write the same thing in many
ways, and a list of names would go out of date. A module that is not recognised is not changed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.fitting.scored_routers import find_normed_router, find_scored_router
from elastic_moe.model.native.block import Norm
from elastic_moe.model.native.linear import Packed, can_pack, linear, pack
from elastic_moe.model.native.router import Router
from elastic_moe.model.operators.norms import fit_norm, fit_other_norms
from elastic_moe.model.operators.rotary import fit_native_rotary, fit_rotary
from elastic_moe.model.operators.trials import OTHERWISE
from elastic_moe.model.torch_private import plain_tensors


def fit_trunk(lib: ctypes.CDLL, trunk: nn.Module, notes: FitNotes) -> int:
    """Give native code to the operators that are recognised in a trunk, which must compute in bfloat16 on CPU.

    Returns the bytes of packed weights. Every norm, router and rotary embedding is added to `notes`, recognised or not.
    """
    packed_bytes = 0
    for module in trunk.modules():
        if not fit_other_norms(lib, module, notes):
            fit_norm(module, partial(Norm, lib=lib), CodePath.NATIVE, notes)
        packed_bytes += _pack_routers(lib, module, notes)
    for module in trunk.modules():
        router = find_normed_router(lib, module, OTHERWISE)
        if router is not None:
            module.forward = router
            notes.add(Part.ROUTER, type(module).__name__, CodePath.NATIVE)
    for name in sorted({type(module).__module__ for module in trunk.modules()}):
        fit_native_rotary(lib, sys.modules[name], notes)
    return packed_bytes


# --- Routers ----------------------------------------------------------------------------------------------------------


class _RouterWeight(nn.Parameter):
    """A matrix that a module multiplies by F.linear in its own code. The multiplication then uses the packed form."""

    packed: Packed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and not kwargs:
            x, weight, bias = args if len(args) == 3 else (*args, None)
            if isinstance(weight, cls) and x.dtype == torch.bfloat16:
                return linear(x, weight.packed, bias)
        with plain_tensors():
            return func(*args, **(kwargs or {}))


def _pack_routers(lib: ctypes.CDLL, module: nn.Module, notes: FitNotes) -> int:
    """Pack the matrix of a module that is neither an nn.Linear nor an embedding, and calls F.linear in its own code.

    Returns the bytes of the packed matrix, or 0 if there is none.
    """
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    # a subclass of nn.Linear may be a router (PhiMoE's is): pack_linears leaves it to its own code
    if weight is None or type(module) is nn.Linear or isinstance(module, nn.Embedding) or not can_pack(weight):
        return 0
    router = _RouterWeight(weight.detach(), requires_grad=False)
    router.packed = pack(lib, weight.detach())
    module.weight = router
    found = _native_router(lib, module, router.packed)
    if not isinstance(found, Router):
        scored = find_scored_router(lib, module, router.packed, OTHERWISE)
        found = f"{found}; {scored}" if isinstance(scored, str) else scored
    if not isinstance(found, str):
        module.forward = found
        notes.add(Part.ROUTER, type(module).__name__, CodePath.NATIVE)
    else:
        notes.add(Part.ROUTER, type(module).__name__, CodePath.PACKED, found)
    return router.packed.nbytes


def _native_router(lib: ctypes.CDLL, module: nn.Module, packed: Packed) -> Router | str:
    """A native forward for the module if `find_router` recognises it; otherwise the reason why it does not."""

    own = dict(module.named_parameters(recurse=False)).get("bias")
    bias = None if own is None or own.shape != (packed.columns,) else own.detach().contiguous()

    def make(top_k: int, normalises: bool, dtype: torch.dtype) -> Router:
        return Router(lib=lib, packed=packed, bias=bias, top_k=top_k, normalises=normalises, dtype=dtype)

    return find_router(module, packed.columns, packed.depth, make, torch.device("cpu"))


Choice = TypeVar("Choice", bound=Callable[[Tensor], tuple[Tensor, Tensor, Tensor]])


def find_router(
    module: nn.Module,
    experts: int,
    hidden: int,
    make: Callable[[int, bool, torch.dtype], Choice],
    device: torch.device,
) -> Choice | str:
    """What takes the place of a router of the usual kind; otherwise the reason why the module is none.

    `make` makes it of the number of choices, of whether their scores are scaled to add up to 1, and of their dtype.
    """
    generator = torch.Generator().manual_seed(0)
    # values are of moderate size, so that no chosen probability is zero
    probe = (torch.randn(64, hidden, generator=generator) / hidden**0.5).bfloat16().to(device)
    try:
        expected = module(probe)
    except OTHERWISE as error:
        return f"it takes other arguments than rows: a trial call failed with {type(error).__name__}"
    if not isinstance(expected, tuple) or len(expected) != 3 or not all(isinstance(t, Tensor) for t in expected):
        return "it does not return logits, scores and choices"
    logits, scores, index = expected
    if scores.shape != index.shape or index.dtype != torch.int64 or not 0 < index.shape[-1] <= experts:
        return "it does not return a score for each of a fixed number of choices"
    for normalises in (True, False):
        router = make(index.shape[-1], normalises, scores.dtype)
        got = router(probe)
        # experts with equal logits may come in any order, since no code promises one
        same = torch.equal(got[0], logits) and torch.equal(logits.gather(1, got[2]), logits.gather(1, index))
        if same and got[1].shape == scores.shape and torch.allclose(got[1].float(), scores.float(), rtol=2**-7):
            return router
    return "it does not choose the largest of a softmax over all experts"


# --- On GPUs ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def fit_gpu_trunk(trunk: nn.Module, notes: FitNotes) -> None:
    """Give kernels of model/gpu/ to a trunk's norms, routers and rotary embeddings. It must compute in bfloat16.

    `notes` gets all of them.
    """
    from elastic_moe.model.gpu.rows import GpuNorm, rotate  # Triton, which it needs, is there only on GPUs

    for module in trunk.modules():
        fit_norm(module, GpuNorm, CodePath.TRITON, notes)
        _fit_gpu_router(module, notes)
    for name in sorted({type(module).__module__ for module in trunk.modules()}):
        fit_rotary(sys.modules[name], "cuda", rotate, CodePath.TRITON, notes)


def _fit_gpu_router(module: nn.Module, notes: FitNotes) -> None:
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
