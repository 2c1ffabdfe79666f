"""Joins the attention half of decoder layers into one native call. The feed-forward half keeps its own code.

A layer is recognised by a trial: a native call is built from the parts that the layer seems to have, and its result
must equal the layer's own, bit for bit, on random input. A layer that is not recognised keeps transformers' code. If
every layer of a trunk is recognised, model/fitting/whole_stack.py joins the layers further.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.experts.store import attach
from elastic_moe.model.fitting.halves import (
    Rotation,
    fed_forward,
    matrix_of,
    native_embeddings,
    native_input,
    norm_of,
    same_in_trial,
)
from elastic_moe.model.fitting.latent_half import LatentLayer, find_latent_half
from elastic_moe.model.fitting.state_layers import FittedStateLayer
from elastic_moe.model.native.attention import TILE, refusal
from elastic_moe.model.native.block import AttentionBlock
from elastic_moe.model.operators.trials import OTHERWISE
from elastic_moe.model.trunk.attention import LATENTS
from elastic_moe.model.trunk.attention_path import AttentionPath, KVShape
from elastic_moe.model.trunk.step_batch import current_batch


class FittedLayer:
    """The forward of a decoder layer whose attention half is joined. It calls the original for other inputs."""

    def __init__(
        self, original: Callable[..., Any], block: AttentionBlock, feed_forward: nn.Module, attention_layer: int
    ) -> None:
        self.rotation = Rotation.REFUSES
        self.block = block
        self.feed_forward = feed_forward
        self.attention_layer = attention_layer
        self._original = original

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch: Any = current_batch()
        mask: Any = kwargs.get("attention_mask")
        embeddings: Any = kwargs.get("position_embeddings")
        embeddings = native_embeddings(embeddings, hidden_states.shape[1], self.block.head_size, self.rotation)
        if args or embeddings is None or not native_input(batch, hidden_states, mask):
            return self._original(hidden_states, *args, **kwargs)
        cosines, sines = embeddings
        sum_TH, normed_TH = self.block(
            batch.of(self.attention_layer).fused,
            batch.cache.stores(self.attention_layer),
            hidden_states[0],
            cosines,
            sines,
            mask.size,
        )
        return sum_TH + fed_forward(self.feed_forward, normed_TH[None])


def decoder_layers(trunk: nn.Module) -> list[nn.Module]:
    """The trunk's decoder layers, found by the name self_attn, which all families share."""
    return [module for module in trunk.modules() if isinstance(getattr(module, "self_attn", None), nn.Module)]


def fit_layers(lib: ctypes.CDLL, trunk: nn.Module, experts: Sequence[nn.Module], notes: FitNotes) -> list[nn.Module]:
    """Join the attention halves that are recognised. Call `fit_trunk` for the trunk before.

    Returns the layers that were joined; their `forward` is a FittedLayer or a LatentLayer now. Every decoder layer is
    added to `notes`.
    `experts` are the trunk's expert modules. A probe replaces their forward, so call `attach` again afterwards.
    """
    attach(experts, lambda layer, hidden, index, weight: hidden * weight.sum(-1, keepdim=True).to(hidden.dtype))
    found = []
    with torch.inference_mode():
        for layer in decoder_layers(trunk):
            if isinstance(layer.forward, FittedStateLayer):
                continue
            fitted = _found(lib, layer)
            if not isinstance(fitted, str):
                layer.forward = fitted
                found.append(layer)
                notes.add(Part.ATTENTION_HALF, type(layer).__name__, CodePath.JOINED)
            else:
                notes.add(Part.ATTENTION_HALF, type(layer).__name__, CodePath.TRANSFORMERS, fitted)
    return found


def _found(lib: ctypes.CDLL, layer: nn.Module) -> FittedLayer | LatentLayer | str:
    """The joined forward of a layer if it is recognised; otherwise the reason why it is not."""
    if getattr(layer.self_attn, LATENTS, None) is not None:
        return find_latent_half(lib, layer)
    fitted = _fitted(lib, layer)
    return fitted if isinstance(fitted, str) else _tried(lib, layer, fitted)


def _fitted(lib: ctypes.CDLL, layer: nn.Module) -> FittedLayer | str:
    """Build a joined forward from the parts that most families have, found by their usual names.

    Returns the reason if the layer has other parts. The result must still be tried on random input.
    """
    attention = getattr(layer, "self_attn", None)
    before, after = (getattr(layer, f"{name}_layernorm", None) for name in ("input", "post_attention"))
    others = [child for child in layer.children() if child not in (attention, before, after)]
    if not isinstance(attention, nn.Module) or before is None or after is None:
        return "it lacks one of self_attn, input_layernorm and post_attention_layernorm"
    if len(others) != 1:
        return f"beside attention and two norms it has {len(others)} parts, where one feed-forward half is expected"
    matrices = {
        name: matrix_of(getattr(attention, f"{name[0]}_proj", None)) for name in ("query", "key", "value", "out")
    }
    norms = {name: norm_of(module) for name, module in (("before", before), ("after", after))}
    if missing := [name for name, matrix in matrices.items() if matrix is None]:
        return f"its attention has no packed matrix for {', '.join(missing)}"
    if missing := [name for name, norm in norms.items() if norm is None]:
        return f"its norm {' and '.join(missing)} attention is not native"
    try:
        block = AttentionBlock(
            lib,
            head_size=int(attention.head_dim),  # type: ignore[arg-type]
            scale=float(attention.scaling),  # type: ignore[arg-type]
            query_norm=norm_of(getattr(attention, "q_norm", None)),
            key_norm=norm_of(getattr(attention, "k_norm", None)),
            sinks=getattr(attention, "sinks", None),
            gated=matrices["query"].packed.columns == 2 * matrices["out"].packed.depth,  # type: ignore[union-attr]
            **matrices,  # type: ignore[arg-type]
            **norms,  # type: ignore[arg-type]
        )
    except (
        AttributeError,
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:  # an attribute is missing or of another kind
        return f"its attention is made of other parts: {error}"
    return FittedLayer(layer.forward, block, others[0], int(attention.layer_idx))  # type: ignore[arg-type]


def _tried(lib: ctypes.CDLL, layer: nn.Module, fitted: FittedLayer) -> FittedLayer | str:
    """The joined forward if it agrees with the layer on random input; otherwise the reason why it is not used."""
    size = fitted.block.head_size
    why = "it does not just add attention to its input, or attends in another way"
    agrees = False
    for width, rotation in ((size, Rotation.REFUSES), (size // 2, Rotation.PART), (size // 2, Rotation.TWICE)):
        fitted.rotation = rotation
        try:
            if _same(lib, layer, fitted, width):
                agrees, accepted = True, rotation
        except OTHERWISE as error:
            if width == size:
                why = f"a trial call with the usual arguments failed with {type(error).__name__}"
    if not agrees:
        return why
    fitted.rotation = accepted
    return fitted


def _same(lib: ctypes.CDLL, layer: nn.Module, fitted: Callable[..., Any], width: int) -> bool:
    """Whether a layer and its joined forward agree in a trial. `width`: that of cosines and sines."""
    attention: Any = layer.self_attn
    heads = attention.k_proj.packed.columns // attention.head_dim
    shape = KVShape(num_heads=heads, key_size=attention.head_dim, value_size=attention.v_proj.packed.columns // heads)
    if refusal(block_size=TILE, key_size=shape.key_size, value_size=shape.value_size) is not None:
        return False
    return same_in_trial(layer, fitted, AttentionPath(lib=lib), shape, attention.q_proj.packed.depth, width)
