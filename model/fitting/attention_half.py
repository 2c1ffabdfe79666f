"""Joins the attention half of decoder layers into one native call. The feed-forward half keeps its own code.

A layer is recognised by a trial: a native call is built from the parts that the layer seems to have, and its result
must equal the layer's own, bit for bit, on random input. A layer that is not recognised keeps transformers' code. If
every layer of a trunk is recognised, model/fitting/whole_stack.py joins the layers further.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.experts.store import attach
from elastic_moe.model.fitting.feed_forward import TwoParts, two_parts_of
from elastic_moe.model.fitting.halves import (
    Rotation,
    Tail,
    matrix_of,
    native_embeddings,
    native_input,
    norm_of,
    same_in_trial,
)
from elastic_moe.model.fitting.latent_half import LatentLayer, find_latent_half
from elastic_moe.model.fitting.probe import run_one_token
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
        self, original: Callable[..., Any], block: AttentionBlock, tail: Tail | TwoParts, attention_layer: int
    ) -> None:
        self.rotation = Rotation.REFUSES
        self.block = block
        self.tail = tail
        self.attention_layer = attention_layer
        self._original = original

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch: Any = current_batch()
        mask: Any = kwargs.get("attention_mask")
        embeddings: Any = kwargs.get("position_embeddings")
        embeddings = native_embeddings(embeddings, hidden_states.shape[1], self.block.head_size, self.rotation)
        # some trunks give a layer what it has no use for, such as Gemma-4's inputs of each layer
        given = any(arg is not None for arg in args)
        if given or embeddings is None or not native_input(batch, hidden_states, mask):
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
        return self.tail(sum_TH, normed_TH)[None]


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
        wide = _has_wide_embeddings(trunk)
        for layer in decoder_layers(trunk):
            if isinstance(layer.forward, FittedStateLayer):
                continue
            fitted = "its cosines and sines are not in bfloat16" if wide else _found(lib, layer)
            if not isinstance(fitted, str):
                layer.forward = fitted
                found.append(layer)
                notes.add(Part.ATTENTION_HALF, type(layer).__name__, CodePath.JOINED)
            else:
                notes.add(Part.ATTENTION_HALF, type(layer).__name__, CodePath.TRANSFORMERS, fitted)
    return found


def _has_wide_embeddings(trunk: nn.Module) -> bool:
    """Whether the trunk gives its layers cosines and sines that are not in bfloat16."""
    seen: list[Any] = []

    def record(hidden_states: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs.get("position_embeddings"))
        return hidden_states

    layers = decoder_layers(trunk)
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = record
    try:
        run_one_token(trunk)
    except OTHERWISE:  # what a layer returns is no tensor, or other layers need what attention leaves
        return False
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
    given = [each for embeddings in seen if isinstance(embeddings, tuple) for each in embeddings]
    return any(isinstance(each, Tensor) and each.dtype != torch.bfloat16 for each in given)


def _found(lib: ctypes.CDLL, layer: nn.Module) -> FittedLayer | LatentLayer | str:
    """The joined forward of a layer if it is recognised; otherwise the reason why it is not."""
    if getattr(layer.self_attn, LATENTS, None) is not None:
        return find_latent_half(lib, layer)
    why = ""
    forms = _forms(layer)
    if isinstance(forms, str):
        return forms
    for form, turns_first in itertools.product(forms, _orders(layer)):
        fitted = _fitted(lib, layer, form, turns_first)
        tried = fitted if isinstance(fitted, str) else _tried(lib, layer, fitted)
        if isinstance(tried, FittedLayer):
            return tried
        why = why or tried
    return why


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """An order of a layer's parts: see AttentionBlock and Tail. Modules that are None are not there."""

    before: nn.Module | None
    behind: nn.Module | None
    after: nn.Module | None
    factor: float
    tail: Tail | TwoParts


_NORMS = tuple(f"{name}_layernorm" for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"))


def _forms(layer: nn.Module) -> list[_Form] | str:
    """The orders that the parts of a layer may have; otherwise the reason why it has none of these."""
    before, attended, between, behind = (getattr(layer, name, None) for name in _NORMS)
    norms = [norm for norm in (before, attended, between, behind) if norm is not None]
    others = [child for child in layer.children() if child is not layer.self_attn and child not in norms]
    if attended is None or (before is None and behind is None):
        return "it lacks one of self_attn, input_layernorm and post_attention_layernorm"
    if between is not None and (parts := two_parts_of(layer)) is not None:
        return [_Form(before=before, behind=attended, after=between, factor=1.0, tail=parts)]
    if len(others) != 1:
        beside = f"beside attention and {len(norms)} norms it has {len(others)} parts"
        return f"{beside}, where one feed-forward half is expected"
    if behind is not None:
        # norms are behind each half; before it too, or not
        tail = Tail(others[0], behind=behind)
        return [_Form(before=before, behind=attended, after=between, factor=1.0, tail=tail)]
    factors = [1.0, *sorted({float(v) for v in vars(layer).values() if isinstance(v, float) and v > 0} - {1.0})]
    return [
        _Form(before=before, behind=None, after=attended, factor=factor, tail=Tail(others[0], factor=factor))
        for factor in factors
    ]


def _orders(layer: nn.Module) -> tuple[bool, ...]:
    """Whether queries and keys may be rotated before their norms."""
    return (False,) if _norms_of_heads(layer)[0] is None else (False, True)


def _norms_of_heads(layer: nn.Module) -> tuple[Any, Any]:
    """The norms of queries and of keys, or None."""
    attention: Any = layer.self_attn
    query, key = (
        next((found for name in names if (found := getattr(attention, name, None)) is not None), None)
        for names in (("q_norm", "query_layernorm"), ("k_norm", "key_layernorm"))
    )
    return query, key


def _fitted(lib: ctypes.CDLL, layer: nn.Module, form: _Form, turns_first: bool) -> FittedLayer | str:
    """Build a joined forward from the parts that most families have, found by their usual names.

    Returns the reason if the layer has other parts. The result must still be tried on random input.
    """
    attention: Any = layer.self_attn
    matrices = {
        name: matrix_of(getattr(attention, f"{name[0]}_proj", None)) for name in ("query", "key", "value", "out")
    }
    named = {"before": form.before, "behind": form.behind, "after": form.after}
    norms = {name: norm_of(module) for name, module in named.items()}
    missing = [name for name, matrix in matrices.items() if matrix is None]
    if getattr(attention, "v_proj", attention) is None and missing == ["value"]:
        missing = []  # values are keys
    if missing:
        return f"its attention has no packed matrix for {', '.join(missing)}"
    if missing := [name for name, module in named.items() if module is not None and norms[name] is None]:
        return f"its norm {' and '.join(missing)} attention is not native"
    query_norm, key_norm = map(norm_of, _norms_of_heads(layer))
    try:
        size = int(attention.head_dim)
        block = AttentionBlock(
            lib,
            head_size=size,
            scale=float(attention.scaling),
            query_norm=query_norm,
            key_norm=key_norm,
            value_norm=norm_of(getattr(attention, "v_norm", None), size),
            sinks=getattr(attention, "sinks", None),
            gated=matrices["query"].packed.columns == 2 * matrices["out"].packed.depth,  # type: ignore[union-attr]
            factor=form.factor,
            turns_first=turns_first,
            **matrices,  # type: ignore[arg-type]
            **norms,  # type: ignore[arg-type]
        )
        return FittedLayer(layer.forward, block, form.tail, int(attention.layer_idx))
    except (
        AttributeError,
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:  # an attribute is missing or of another kind
        return f"its attention is made of other parts: {error}"


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


def _same(lib: ctypes.CDLL, layer: nn.Module, fitted: FittedLayer, width: int) -> bool:
    """Whether a layer and its joined forward agree in a trial. `width`: that of cosines and sines."""
    attention: Any = layer.self_attn
    heads = attention.k_proj.packed.columns // attention.head_dim
    shape = KVShape(num_heads=heads, key_size=attention.head_dim, value_size=fitted.block.value_size)
    if refusal(block_size=TILE, key_size=shape.key_size, value_size=shape.value_size) is not None:
        return False
    return same_in_trial(layer, fitted, AttentionPath(lib=lib), shape, attention.q_proj.packed.depth, width)
