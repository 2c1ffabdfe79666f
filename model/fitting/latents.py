"""Finds the layers that make keys and values of latents, and has their latents cached instead (MLA).

transformers' modules of this kind expand latents in a method of their own, right before they attend. A trial finds out
whether the method computes what model/trunk/latent.py computes: with the matrix of one of the module's linear layers,
that code must make the same keys and values of random latents, and the same bits of latents that have a single 1. A
module that is not recognised goes on to make keys and values, which are cached.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model.operators.trials import OTHERWISE
from elastic_moe.model.transformers_private import EXPANDS_LATENTS
from elastic_moe.model.trunk.attention import LATENTS
from elastic_moe.model.trunk.attention_path import KVShape
from elastic_moe.model.trunk.latent import LatentAttention

_UNITS = 4
"""Latents with a single 1 in a trial."""


@dataclass(slots=True)
class Expansion:
    """Stands for a module's method that expands latents, and records the sizes of what it gets."""

    module: Any
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    latent_size: int = 0
    rotated_size: int = 0

    def __call__(self, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        self.latent_size, self.rotated_size = latent.shape[-1], rotated.shape[-1]
        return self.expand(latent, rotated)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentLayers:
    """Which attention layers make keys and values of latents."""

    shapes: dict[int, KVShape]
    """What the cache of each layer holds whose latents are cached."""
    expanded: dict[int, str]
    """Layer -> why its keys and values are cached instead."""
    modules: list[nn.Module]
    """The attention modules of the layers in `shapes`."""

    def pack(self, lib: ctypes.CDLL) -> int:
        """Give the layers the native library's form of their matrices. Returns the bytes of these."""
        for module in self.modules:
            setattr(module, LATENTS, getattr(module, LATENTS).with_native(lib))
        return sum(getattr(module, LATENTS).packed_bytes for module in self.modules)


def watch_expansions(trunk: nn.Module) -> list[Expansion]:
    """Put an Expansion in place of each such method. Run the trunk once, and then call `cache_latents`."""
    found = []
    for module in trunk.modules():
        expand = getattr(module, EXPANDS_LATENTS, None)
        if callable(expand):
            found.append(Expansion(module, expand))
            setattr(module, EXPANDS_LATENTS, found[-1])
    return found


@torch.inference_mode()
def cache_latents(expansions: Sequence[Expansion]) -> LatentLayers:
    """Have the latents cached of every module that is recognised. All modules have their own method again otherwise."""
    layers = LatentLayers(shapes={}, expanded={}, modules=[])
    for expansion in expansions:
        module = expansion.module
        delattr(module, EXPANDS_LATENTS)
        try:
            found = _recognised(expansion)
        except OTHERWISE as error:
            found = f"a trial call with latents failed with {type(error).__name__}"
        if isinstance(found, str):
            layers.expanded[int(module.layer_idx)] = found
            continue
        setattr(module, EXPANDS_LATENTS, _unexpanded)
        setattr(module, LATENTS, found)
        layers.shapes[int(module.layer_idx)] = found.shape
        layers.modules.append(module)
    return layers


def _unexpanded(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Hand latents to attention as they are, in place of keys and values."""
    return latent, rotated


class _Matrices(nn.Module):
    """Takes the place of the linear layer that expands latents, so that its matrix stays as it is and is not packed."""

    def __init__(self, matrix: nn.Parameter) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


def _recognised(expansion: Expansion) -> LatentAttention | str:
    """How the module makes keys and values, or why it is not known."""
    size, rotated_size = expansion.latent_size, expansion.rotated_size
    if not size or not rotated_size:
        return "it made no keys of latents in a trial"
    like = next(expansion.module.parameters())
    latent_LD = _trial_latents(size, rotated_size).to(like.device, like.dtype)
    parts = torch.split(latent_LD, [size, rotated_size], -1)
    (key_NLD,), (value_NLV,) = expansion.expand(*(part[None, None] for part in parts))
    key_size = key_NLD.shape[-1] - rotated_size
    for name, child in expansion.module.named_children():
        if type(child) is not nn.Linear or child.bias is not None or child.in_features != size:
            continue
        if child.out_features != len(key_NLD) * (key_size + value_NLV.shape[-1]):
            continue
        matrices_NXR = child.weight.detach().view(len(key_NLD), -1, size)
        found = LatentAttention(up_NXR=matrices_NXR, key_size=key_size, rotated_size=rotated_size)
        if _same(found.expand(latent_LD, slice(None)), (key_NLD, value_NLV)):
            setattr(expansion.module, name, _Matrices(child.weight))
            return found
    return "none of its linear layers makes its keys and values, beside the rotated part"


def _trial_latents(size: int, rotated_size: int) -> Tensor:
    """[L, R + P] random latents, and then some that have a single 1."""
    g = torch.Generator().manual_seed(0)
    latent_LD = torch.randn(5 + _UNITS, size + rotated_size, generator=g)
    latent_LD[5:, :size] = torch.eye(size)[torch.linspace(0, size - 1, _UNITS).long()]
    return latent_LD


def _same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Whether keys and values are the same: bit for bit for latents that have a single 1."""
    # products of other shapes may add up in another order
    tolerance = 1e-4 if got[0].dtype == torch.float32 else 0.05
    return all(
        have.shape == want.shape
        and torch.equal(have[:, 5:], want[:, 5:])
        and torch.allclose(have.float(), want.float(), rtol=tolerance, atol=tolerance)
        for have, want in zip(got, expected, strict=True)
    )
