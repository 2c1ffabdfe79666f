"""Gives the trunk's small operators native code: transformers computes each of them with several operators of torch.

A module is recognised by what it computes on random input and not by its name: families write the same thing in many
ways, and a list of names would go out of date. A module that is not recognised is not changed.
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.fitting.scored_routers import find_scored_router
from elastic_moe.model.native.block import GatedNorm, Norm
from elastic_moe.model.native.linear import Packed, can_pack, linear, pack
from elastic_moe.model.native.router import Router
from elastic_moe.model.rms_norm import GatedRmsNorm, RmsNorm
from elastic_moe.model.torch_private import plain_tensors
from elastic_moe.model.transformers_private import (
    ROTARY,
    ROTARY_OF_PAIRS,
    replace_rotary_function,
    rotary_function,
)

OTHERWISE = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
"""Errors that a trial call raises if the module expects other arguments."""


def fit_trunk(lib: ctypes.CDLL, trunk: nn.Module, notes: FitNotes) -> int:
    """Give native code to the operators that are recognised in a trunk, which must compute in bfloat16 on CPU.

    Returns the bytes of packed weights. Every norm, router and rotary embedding is added to `notes`, recognised or not.
    """
    packed_bytes = 0
    for module in trunk.modules():
        if not _fit_gated_norm(lib, module, notes):
            fit_norm(module, partial(Norm, lib=lib), CodePath.NATIVE, notes)
        packed_bytes += _pack_routers(lib, module, notes)
    for name in sorted({type(module).__module__ for module in trunk.modules()}):
        _fit_rotary(lib, sys.modules[name], notes)
    return packed_bytes


# --- Norms ------------------------------------------------------------------------------------------------------------


class MakeNorm(Protocol):
    def __call__(self, *, formula: RmsNorm) -> Callable[[Tensor], Tensor]: ...


def fit_norm(module: nn.Module, make: MakeNorm, path: CodePath, notes: FitNotes) -> None:
    """Give the module a forward that `make` makes, if it is recognised as a norm."""
    found = find_norm(module)
    kind = type(module).__name__
    if not isinstance(found, str):
        module.forward = make(formula=found)
        notes.add(Part.NORMS, kind, path)
    elif "norm" in kind.lower():
        # the name decides only whether the report mentions the module
        notes.add(Part.NORMS, kind, CodePath.TRANSFORMERS, found)


def _fit_gated_norm(lib: ctypes.CDLL, module: nn.Module, notes: FitNotes) -> bool:
    """Give the module a native forward if it is recognised as a norm with a gate."""
    formula = _find_gated_norm(module)
    if formula is None:
        return False
    module.forward = GatedNorm(lib=lib, formula=formula, original=module.forward)
    notes.add(Part.NORMS, type(module).__name__, CodePath.NATIVE)
    return True


def _find_gated_norm(module: nn.Module) -> GatedRmsNorm | None:
    """What the module makes of rows and of a gate in bfloat16; None if no formula gives the same."""
    parameters = list(module.parameters())
    if len(parameters) != 1 or parameters[0].dim() != 1 or len(inspect.signature(module.forward).parameters) != 2:
        return None
    weight = parameters[0].detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, len(weight), generator=generator) * torch.logspace(-2, 2, 8)[:, None]
    probe, gate = x.bfloat16(), torch.randn(x.shape, generator=generator).bfloat16()
    try:
        expected = module(probe, gate)
    except OTHERWISE:
        return None
    if not isinstance(expected, Tensor) or expected.dtype != torch.bfloat16 or expected.shape != probe.shape:
        return None
    numbers = vars(module).values()
    groups = {len(weight), *(v for v in numbers if type(v) is int and v > 0 and len(weight) % v == 0)}
    constants = [v for v in numbers if isinstance(v, float)]
    for epsilon, group, flags in itertools.product(
        constants, sorted(groups), itertools.product((True, False), repeat=3)
    ):
        rounds, gate_first, silu = flags
        formula = GatedRmsNorm(
            weight=weight.float().contiguous(),
            epsilon=epsilon,
            group=group,
            rounds=rounds,
            gate_first=gate_first,
            silu=silu,
        )
        if torch.equal(formula(probe, gate), expected):
            return formula
    return None


def find_norm(module: nn.Module) -> RmsNorm | str:
    """What the module computes in bfloat16; otherwise the reason why it is not recognised as a norm."""
    parameters = list(module.parameters())
    if len(parameters) != 1 or parameters[0].dim() != 1 or list(module.children()):
        return "it has other parameters than one vector"
    weight = parameters[0].detach()
    if len(inspect.signature(module.forward).parameters) != 1:
        return "it takes other arguments than rows"
    probe = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 8)[:, None]
    probe = probe.bfloat16().to(weight.device)
    try:
        expected = module(probe)
    except (RuntimeError, TypeError, ValueError) as error:  # it expects something else than rows
        return f"a trial call failed with {type(error).__name__}"
    if not isinstance(expected, Tensor) or expected.dtype != torch.bfloat16 or expected.shape != probe.shape:
        return "it does not make bfloat16 rows of bfloat16 rows"
    constants = [float(v) for v in vars(module).values() if isinstance(v, float)]
    factors = [factor.contiguous() for factor in (weight.float(), 1 + weight.float())]
    for factor, epsilon, rounds in itertools.product(factors, constants, (True, False)):
        formula = RmsNorm(weight=factor, epsilon=epsilon, rounds=rounds)
        if torch.equal(formula(probe), expected):
            return formula
    return "no formula of a root mean square normalisation gives its values"


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
    """Pack the matrix of a module that is neither a linear layer nor an embedding, and calls F.linear in its own code.

    Returns the bytes of the packed matrix, or 0 if there is none.
    """
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or isinstance(module, nn.Linear | nn.Embedding) or not can_pack(weight):
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


# --- Rotary embedding -------------------------------------------------------------------------------------------------


def _fit_rotary(lib: ctypes.CDLL, module: Any, notes: FitNotes) -> None:
    """Replace a modelling file's rotary functions by some that give the same bits with one native call per tensor."""
    for name in (ROTARY, ROTARY_OF_PAIRS):
        pairs = name == ROTARY_OF_PAIRS

        def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairs: bool = pairs) -> tuple[Tensor, Tensor]:
            return _rotate(lib, q, cos, sin, pairs), _rotate(lib, k, cos, sin, pairs)

        fit_rotary(module, "cpu", turn, CodePath.NATIVE, notes, name)


Turn = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Turns q and k [1, heads, T, size] by cosines and sines [1, T, size]."""


def fit_rotary(module: Any, device: str, turn: Turn, path: CodePath, notes: FitNotes, name: str = ROTARY) -> None:
    """Let `turn` serve what a modelling file's rotary function is given in bfloat16 on a kind of device."""
    original = rotary_function(module, name)
    if original is None:
        return
    file = module.__name__.rpartition(".")[2]
    replaced = hasattr(original, "emoe_original")
    if not replaced and not turns_as_expected(original, pairs=name == ROTARY_OF_PAIRS):
        notes.add(Part.ROTARY, file, CodePath.TRANSFORMERS, "it does not turn halves of a head against each other")
        return
    notes.add(Part.ROTARY, file, path)
    if replaced:
        return

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not all(_fits(x, cos, sin, device) for x in (q, k)):
            return original(q, k, cos, sin, *args, **kwargs)
        return turn(q, k, cos, sin)

    apply_rotary_pos_emb.emoe_original = original  # type: ignore[attr-defined]
    replace_rotary_function(module, apply_rotary_pos_emb, name)


def turns_as_expected(function: Callable[..., Any], *, pairs: bool = False) -> bool:
    """Whether the function computes x * cos + (-second half, first half) * sin.

    `pairs`: of numbers that are sorted first, those of even places before those of odd ones, and with the first half of
    cosines and sines twice.
    """
    if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8))
    )
    try:
        got = function(q, k, cos, sin)
    except RuntimeError:  # the function expects cosines of another shape
        return False
    if pairs:
        cos, sin = (torch.cat((t[..., :4], t[..., :4]), -1) for t in (cos, sin))
    for x, out in zip((q, k), got, strict=True):
        first, second = (x[..., ::2], x[..., 1::2]) if pairs else x.chunk(2, -1)
        own, turned = torch.cat((first, second), -1), torch.cat((-second, first), -1)
        if not torch.equal(own * cos[:, None] + turned * sin[:, None], out):
            return False
    return True


def _fits(x: Tensor, cos: Tensor, sin: Tensor, device: str) -> bool:
    """Whether x is [1, heads, T, size] and cosines and sines are [1, T, size], all of them bfloat16 on the device."""
    return (
        x.dtype == cos.dtype == sin.dtype == torch.bfloat16
        and x.device.type == device
        and x.dim() == 4
        and x.shape[0] == 1
        and x.stride(3) == 1
        and cos.shape == sin.shape == (1, x.shape[2], x.shape[3])
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


def _rotate(lib: ctypes.CDLL, x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    _, heads, tokens, size = x.shape
    out = torch.empty(1, tokens, heads, size, dtype=torch.bfloat16)
    strides = x.stride(1), x.stride(2)
    lib.emoe_rotate(x.data_ptr(), *strides, tokens, heads, size, cos.data_ptr(), sin.data_ptr(), pairs, out.data_ptr())
    return out.transpose(1, 2)
