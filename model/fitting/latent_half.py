"""Joins the attention half of decoder layers that attend to latents into one native call (MLA).

As in model/fitting/attention_half.py, a trial must give the bits of the layer's own code. Long prompts, whose latents
are cheaper to expand (model/trunk/latent.py), keep that code.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from elastic_moe.model.fitting.halves import (
    Rotation,
    fed_forward,
    matrix_of,
    native_embeddings,
    native_input,
    norm_of,
    same_in_trial,
)
from elastic_moe.model.native.attention import TILE, refusal
from elastic_moe.model.native.block import LatentBlock
from elastic_moe.model.operators.trials import OTHERWISE
from elastic_moe.model.trunk.attention import LATENTS
from elastic_moe.model.trunk.attention_path import AttentionPath
from elastic_moe.model.trunk.latent import LatentAttention
from elastic_moe.model.trunk.step_batch import current_batch


class LatentLayer:
    """The forward of a decoder layer whose attention half is joined. It calls the original for other inputs."""

    def __init__(
        self,
        original: Callable[..., Any],
        block: LatentBlock,
        feed_forward: nn.Module,
        layer: int,
        *,
        below: int,
        positions: int | None,
    ) -> None:
        """`layer` is its number in the KV cache. Sequences with `below` rows or more go to the original, and so do
        steps with a token at `positions` or beyond, from where on the layer scales its queries (None: it does not)."""
        self._block = block
        self._feed_forward = feed_forward
        self._layer = layer
        self._below = below
        self._positions = positions
        self._original = original

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch: Any = current_batch()
        mask: Any = kwargs.get("attention_mask")
        embeddings = native_embeddings(
            kwargs.get("position_embeddings"), hidden_states.shape[1], self._block.rotated, Rotation.REFUSES
        )
        if (
            args
            or embeddings is None
            or not native_input(batch, hidden_states, mask)
            or self._expands(batch)
            or self._is_far(kwargs.get("position_ids"))
        ):
            return self._original(hidden_states, *args, **kwargs)
        cache, _ = batch.cache.stores(self._layer)
        sum_TH, normed_TH = self._block(batch.fused, cache, hidden_states[0], *embeddings, mask.size)
        return sum_TH + fed_forward(self._feed_forward, normed_TH[None])

    def _expands(self, batch: Any) -> bool:
        """Whether latents of some sequence of a StepBatch are cheaper to expand."""
        return any(end - start >= self._below for start, end, _ in batch.pieces)

    def _is_far(self, position_ids: Any) -> bool:
        """Whether some token may lie where the layer scales its queries. `position_ids`: [1, T]; None: not known."""
        return self._positions is not None and (position_ids is None or int(position_ids.max()) >= self._positions)


def find_latent_half(lib: ctypes.CDLL, layer: nn.Module) -> LatentLayer | str:
    """The joined forward of a layer whose attention is over latents; otherwise the reason why it keeps its own."""
    attention: Any = layer.self_attn
    latent: LatentAttention = getattr(attention, LATENTS)
    size = latent.latent_size + latent.rotated_size
    if refusal(block_size=TILE, key_size=size, value_size=latent.latent_size) is not None:
        return "its latents do not fit native attention"
    why = ""
    for positions, pairs in itertools.product(_scaled_from(attention), (True, False)):
        try:
            fitted = _latent_layer(lib, layer, latent, pairs=pairs, positions=positions)
        except OTHERWISE as error:  # an attribute is missing or of another kind
            return f"its attention over latents is made of other parts: {error}"
        path, hidden = AttentionPath(lib=lib), attention.kv_a_proj_with_mqa.packed.depth
        try:
            if same_in_trial(layer, fitted, path, latent.shape, hidden, latent.rotated_size, border=positions):
                return fitted
            why = "its attention over latents computes something else"
        except OTHERWISE as error:
            why = f"a trial call with the usual arguments failed with {type(error).__name__}"
    return why


def _scaled_from(attention: Any) -> tuple[int | None, ...]:
    """The positions from which on the layer may scale its queries: none, or (Mistral-4) those that its model was not
    trained on at first."""
    try:
        return None, int(attention.config.rope_parameters["original_max_position_embeddings"])
    except OTHERWISE:
        return (None,)


def _latent_layer(
    lib: ctypes.CDLL, layer: nn.Module, latent: LatentAttention, *, pairs: bool, positions: int | None
) -> LatentLayer:
    """Build a joined forward from the parts that most families have, found by their usual names.

    Raises one of OTHERWISE if the layer has other parts. The result must still be tried on random input.
    """
    attention: Any = layer.self_attn
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    others = [child for child in layer.children() if child not in (attention, before, after)]
    if len(others) != 1 or latent.packed is None:
        raise ValueError("it has other parts than attention, two norms and a feed-forward half")
    down = getattr(attention, "q_a_proj", None)
    parts = {
        "before": norm_of(before),
        "after": norm_of(after),
        "query": matrix_of(attention.q_proj if down is None else attention.q_b_proj),
        "latents": matrix_of(attention.kv_a_proj_with_mqa),
        "latent_norm": norm_of(attention.kv_a_layernorm),
        "out": matrix_of(attention.o_proj),
    }
    if missing := [name for name, part in parts.items() if part is None]:
        raise ValueError(f"{' and '.join(missing)} is not native")
    block = LatentBlock(
        lib,
        scale=float(attention.scaling),
        pairs=pairs,
        query_down=None if down is None else matrix_of(down),
        query_norm=None if down is None else norm_of(attention.q_a_layernorm),
        key_up=latent.packed[0],
        value_up=latent.packed[1],
        **parts,  # type: ignore[arg-type]
    )
    return LatentLayer(
        layer.forward,
        block,
        others[0],
        int(attention.layer_idx),
        below=latent.fewest_expanded,
        positions=positions,
    )
