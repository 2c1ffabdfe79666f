"""Finds the layers of a trunk that keep a state per sequence, and gives them a forward for packed tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.fitting.probe import run_one_token
from elastic_moe.model.native import library
from elastic_moe.model.native.refusals import native_refusal
from elastic_moe.model.states.finding import StateLayer, find_state_layers
from elastic_moe.model.states.packed import PackedStates
from elastic_moe.model.transformers_private import LinearAttentionCacheLayerMixin


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedStates:
    layers: tuple[StateLayer, ...] = ()
    """The layers in the order in which they run. Their forward takes packed tokens."""
    plain: Collection[nn.Module] = ()
    """Linear layers whose weights the layers' own code reads, so that they must stay as they are."""


@torch.inference_mode()
def fit_states(trunk: nn.Module, notes: FitNotes) -> FittedStates:
    """Replace the forward of each layer that keeps states. A probe must have taken the place of the trunk's experts."""
    config = getattr(trunk, "config", None)
    if config is None or not any(
        isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers
    ):
        return FittedStates()
    called: set[nn.Module] = set()
    linears = [module for module in trunk.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in linears]
    layers = find_state_layers(trunk, lambda: run_one_token(trunk))
    for handle in handles:
        handle.remove()
    for number, layer in enumerate(layers):
        _fit(layer, number, notes)
    inside = {module for layer in layers for module in layer.module.modules()}
    return FittedStates(layers=layers, plain=[linear for linear in linears if linear in inside - called])


def _fit(layer: StateLayer, number: int, notes: FitNotes) -> None:
    like = next(layer.module.parameters())
    refusal = native_refusal(layer.dtype, like.device)
    packed = PackedStates(layer, number, None if refusal else library())
    layer.module.forward = packed
    kinds = sorted({kept.kind for kept in layer.keeps})
    native = kinds == sorted(packed.native)
    path = CodePath.NATIVE if native else CodePath.TRANSFORMERS
    why = None if native else refusal
    if not native and not refusal:
        others = " and ".join(kind for kind in kinds if kind not in packed.native)
        why = f"no native function gives the values of its {others} states for single tokens"
    if native and packed.scans is None:
        why = "for single tokens only: no native function gives the values of a prompt"
    if not packed.goes_on:
        why = f"{why or 'for single tokens only'}; a prompt is run token by token behind its first chunk"
    notes.add(Part.STATES, type(layer.module).__name__, path, why)
