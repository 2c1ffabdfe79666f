"""Joins the attention half of decoder layers into one native call. The feed-forward half keeps its own code.

A layer is recognised by a trial: a native call is built from the parts that the layer seems to have, and its result
must equal the layer's own, bit for bit, on random input. A layer that is not recognised keeps transformers' code. If
every layer of a trunk is recognised, model/fitting/whole_stack.py joins the layers further.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.experts.store import attach
from elastic_moe.model.fitting.small_ops import OTHERWISE
from elastic_moe.model.native.attention import TILE, NativeBatch, refusal
from elastic_moe.model.native.block import AttentionBlock, Matrix, Norm
from elastic_moe.model.native.linear import Packed
from elastic_moe.model.trunk.attention import Window
from elastic_moe.model.trunk.attention_path import AttentionPath, KVShape
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.linear import PackedLinear
from elastic_moe.model.trunk.step_batch import SequenceSlice, StepBatch, current_batch, step_context


class Rotation(Enum):
    """What a layer makes of cosines and sines that are narrower than its heads."""

    REFUSES = "it takes none"
    PART = "it rotates the first numbers of a head"
    TWICE = "they are for both halves of a head"
    """They are half as wide as a head."""


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


def fed_forward(module: nn.Module, x: Tensor) -> Any:
    """The output of a feed-forward half. Some return their router's scores beside it."""
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


def decoder_layers(trunk: nn.Module) -> list[nn.Module]:
    """The trunk's decoder layers, found by the name self_attn, which all families share."""
    return [module for module in trunk.modules() if isinstance(getattr(module, "self_attn", None), nn.Module)]


def fit_layers(lib: ctypes.CDLL, trunk: nn.Module, experts: Sequence[nn.Module], notes: FitNotes) -> list[nn.Module]:
    """Join the attention halves that are recognised. Call `fit_trunk` for the trunk before.

    Returns the layers that were joined; their `forward` is a FittedLayer now. Every decoder layer is added to `notes`.
    `experts` are the trunk's expert modules. A probe replaces their forward, so call `attach` again afterwards.
    """
    attach(experts, lambda layer, hidden, index, weight: hidden * weight.sum(-1, keepdim=True).to(hidden.dtype))
    found = []
    with torch.inference_mode():
        for layer in decoder_layers(trunk):
            fitted = _fitted(lib, layer)
            if isinstance(fitted, FittedLayer):
                fitted = _tried(lib, layer, fitted)
            if isinstance(fitted, FittedLayer):
                layer.forward = fitted
                found.append(layer)
                notes.add(Part.ATTENTION_HALF, type(layer).__name__, CodePath.JOINED)
            else:
                notes.add(Part.ATTENTION_HALF, type(layer).__name__, CodePath.TRANSFORMERS, fitted)
    return found


def native_input(batch: Any, hidden: Tensor, mask: Any) -> bool:
    """Whether native functions accept the arguments that a trunk passes to a layer in a step."""
    return (
        isinstance(batch, StepBatch)
        and isinstance(batch.fused, NativeBatch)
        and isinstance(mask, Window)
        and hidden.dtype == torch.bfloat16
        and hidden.is_contiguous()
    )


def native_embeddings(embeddings: Any, tokens: int, head_size: int, rotation: Rotation) -> tuple[Tensor, Tensor] | None:
    """The cosines and sines [T, D] of so many tokens that native functions take; None if a trunk's are none."""
    if not isinstance(embeddings, tuple) or len(embeddings) != 2:
        return None
    cosines, sines = embeddings
    width = cosines.shape[-1]
    if not all(t.shape == (1, tokens, width) and t.dtype == torch.bfloat16 for t in embeddings):
        return None
    if width == head_size or (width < head_size and width % 2 == 0 and rotation is Rotation.PART):
        return cosines[0].contiguous(), sines[0].contiguous()
    if 2 * width == head_size and rotation is Rotation.TWICE:
        return torch.cat((cosines[0], cosines[0]), -1), torch.cat((sines[0], sines[0]), -1)
    return None


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
    matrices = {name: _matrix(getattr(attention, f"{name[0]}_proj", None)) for name in ("query", "key", "value", "out")}
    norms = {name: _norm(module) for name, module in (("before", before), ("after", after))}
    if missing := [name for name, matrix in matrices.items() if matrix is None]:
        return f"its attention has no packed matrix for {', '.join(missing)}"
    if missing := [name for name, norm in norms.items() if norm is None]:
        return f"its norm {' and '.join(missing)} attention is not native"
    try:
        block = AttentionBlock(
            lib,
            head_size=int(attention.head_dim),  # type: ignore[arg-type]
            scale=float(attention.scaling),  # type: ignore[arg-type]
            query_norm=_norm(getattr(attention, "q_norm", None)),
            key_norm=_norm(getattr(attention, "k_norm", None)),
            sinks=getattr(attention, "sinks", None),
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


def _matrix(module: Any) -> Matrix | None:
    if not isinstance(module, PackedLinear) or not isinstance(module.packed, Packed):
        return None
    return Matrix(packed=module.packed, bias=module.bias)


def _norm(module: Any) -> Norm | None:
    forward = getattr(module, "forward", None)
    return forward if isinstance(forward, Norm) else None


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
    """Whether a layer and its joined forward agree: on a prompt and the token after it, with and without a window.

    `width`: that of cosines and sines.
    """
    attention: Any = layer.self_attn
    hidden_size = attention.q_proj.packed.depth
    heads = attention.k_proj.packed.columns // attention.head_dim
    shape = KVShape(num_heads=heads, key_size=attention.head_dim, value_size=attention.v_proj.packed.columns // heads)
    if refusal(block_size=TILE, key_size=shape.key_size, value_size=shape.value_size) is not None:
        return False
    path = AttentionPath(lib=lib)
    generator = torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).bfloat16()

    for size in (None, 3):
        caches = [
            KVCache(
                {attention.layer_idx: shape},
                num_blocks=1,
                block_size=TILE,
                dtype=torch.bfloat16,
                device=cpu,
                path=path,
            )
            for _ in range(2)
        ]
        for first, last in itertools.pairwise((0, 5, 6)):
            piece = SequenceSlice(token_ids=[0] * (last - first), start=first, block_ids=[0], prompt_length=5)
            tokens = last - first
            hidden = random(1, tokens, hidden_size)
            embeddings = random(1, tokens, width), random(1, tokens, width)
            outputs = []
            for forward, cache in zip((layer.forward, fitted), caches, strict=True):
                with step_context(StepBatch.build([piece], cache, cpu)):
                    outputs.append(
                        forward(
                            hidden.clone(),
                            attention_mask=Window(size),
                            position_ids=torch.arange(first, last)[None],
                            position_embeddings=embeddings,
                            past_key_values=None,
                            use_cache=False,
                        )
                    )
            if not all(isinstance(out, Tensor) for out in outputs) or not torch.equal(*outputs):
                return False
    return True
