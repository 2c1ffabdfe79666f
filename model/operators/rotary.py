"""Recognises the rotary functions of modelling files by what they compute, and puts native code in their place."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.operators.trials import OTHERWISE
from elastic_moe.model.transformers_private import (
    ROTARY,
    ROTARY_OF_PAIRS,
    replace_rotary_function,
    rotary_function,
)


def fit_native_rotary(lib: ctypes.CDLL, module: Any, notes: FitNotes) -> None:
    """Replace a modelling file's rotary functions by some that give the same bits with one native call per tensor."""
    if _fit_rotary_of_one(lib, module, notes):
        return
    for name in (ROTARY, ROTARY_OF_PAIRS):
        pairs = name == ROTARY_OF_PAIRS

        def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairs: bool = pairs) -> tuple[Tensor, Tensor]:
            return _rotate(lib, q, cos, sin, pairs), _rotate(lib, k, cos, sin, pairs)

        fit_rotary(module, "cpu", turn, CodePath.NATIVE, notes, name)


def _fit_rotary_of_one(lib: ctypes.CDLL, module: Any, notes: FitNotes) -> bool:
    """Replace a rotary function that takes one tensor, as Gemma-4's does. Returns whether the file has one."""
    original = rotary_function(module)
    if original is None:
        return False
    replaced = hasattr(original, "emoe_original")
    if not _turns_one(getattr(original, "emoe_original", original)):
        return False
    notes.add(Part.ROTARY, module.__name__.rpartition(".")[2], CodePath.NATIVE)
    if replaced:
        return True

    def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
        turned = x.transpose(1, 2) if unsqueeze_dim == 2 and x.dim() == 4 else x  # [1, heads, T, size]
        if unsqueeze_dim not in (1, 2) or not _fits(turned, cos, sin, "cpu"):
            made: Tensor = original(x, cos, sin, unsqueeze_dim)
            return made
        out = _rotate(lib, turned, cos, sin, False)
        return out.transpose(1, 2) if unsqueeze_dim == 2 else out

    apply_rotary_pos_emb.emoe_original = original  # type: ignore[attr-defined]
    replace_rotary_function(module, apply_rotary_pos_emb)
    return True


def _turns_one(function: Callable[..., Any]) -> bool:
    """Whether the function computes x * cos + (-second half, first half) * sin, for heads in both places."""
    if list(inspect.signature(function).parameters) != ["x", "cos", "sin", "unsqueeze_dim"]:
        return False
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(shape, generator=generator).bfloat16() for shape in ((1, 2, 3, 8), (1, 3, 8), (1, 3, 8)))
    first, second = x.chunk(2, -1)
    expected = x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
    try:
        got = function(x, cos, sin), function(x.transpose(1, 2), cos, sin, unsqueeze_dim=2).transpose(1, 2)
    except OTHERWISE:
        return False
    return all(isinstance(out, Tensor) and torch.equal(out, expected) for out in got)


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
