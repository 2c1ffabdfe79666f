"""Finds the layers of a trunk that keep a state per sequence, and gives them a forward for packed tokens."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.fitting.probe import run_one_token
from elastic_moe.model.states.finding import StateLayer, find_state_layers
from elastic_moe.model.states.packed import PackedStates
from elastic_moe.model.transformers_private import LinearAttentionCacheLayerMixin


@torch.inference_mode()
def fit_states(trunk: nn.Module, notes: FitNotes) -> tuple[StateLayer, ...]:
    """Replace the forward of each such layer. A probe must have taken the place of the trunk's experts."""
    config = getattr(trunk, "config", None)
    if config is None or not any(
        isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers
    ):
        return ()
    layers = find_state_layers(trunk, lambda: run_one_token(trunk))
    for number, layer in enumerate(layers):
        packed = PackedStates(layer, number)
        layer.module.forward = packed
        notes.add(Part.STATES, type(layer.module).__name__, CodePath.TRANSFORMERS, packed.note)
    return layers
