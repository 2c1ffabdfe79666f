"""Finds the shapes of a trunk's layers by running one token through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic_moe.model.exchange.dispatcher import LayerShape
from elastic_moe.model.experts.store import attach
from elastic_moe.model.trunk.attention_path import KVShape
from elastic_moe.model.trunk.step_batch import ShapeProbe, step_context


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkShapes:
    """The shapes of a trunk that a cache, an exchange and an empty step need."""

    kv: dict[int, KVShape]
    """The KV shape of each attention layer, in order."""
    layers: tuple[LayerShape, ...]
    """[L] the shape of each MoE layer."""


@torch.inference_mode()
def probe_shapes(trunk: nn.Module, experts: Sequence[nn.Module]) -> TrunkShapes:
    """Run one token through the trunk. A probe replaces its experts' forward, so call `attach` again afterwards."""
    shapes: dict[int, LayerShape] = {}

    def record(layer: int, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        shapes[layer] = LayerShape(hidden=hidden.shape[-1], top_k=index.shape[-1], dtype=hidden.dtype)
        return torch.zeros_like(hidden)

    attach(experts, record)
    probe = run_one_token(trunk)
    return TrunkShapes(
        kv=dict(sorted(probe.shapes.items())), layers=tuple(shapes[layer] for layer in range(len(experts)))
    )


def run_one_token(trunk: nn.Module) -> ShapeProbe:
    """Run one token through a trunk whose experts are replaced. Returns what the attention calls show."""
    probe = ShapeProbe()
    device = next(trunk.parameters()).device
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with step_context(probe):
        trunk(input_ids=token, position_ids=token, attention_mask=token == 0, use_cache=False)
    return probe
