"""Attention of a packed step over the paged KV cache, behind transformers' attention interface.

The trunk passes q, k, v of all tokens of the step as one row [1, heads, T, D]. The `StepBatch` in force says which
tokens belong to which sequence and where the sequence's keys lie. Sliding windows, sinks and soft-caps are supported.
The native library computes attention in bfloat16 on CPU if it is available, and FlashAttention (model/trunk/flash.py)
in 16 bits on CUDA. Otherwise this file computes it by matrix products.

Legend: T tokens of the step, R sequences decoded together, Q query rows of a tile, L keys, N query heads,
G key heads, M = N/G query heads per key head, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from elastic_moe.model.native.attention import Rules
from elastic_moe.model.trunk.step_batch import (
    Deferred,
    Prefill,
    ShapeProbe,
    StepBatch,
    current_batch,
)

NAME = "emoe"
"""The name of our attention function in transformers' registry."""

_TILE = 128
"""Query rows of a prefill that are computed at a time, which bounds the memory of the scores."""


LATENTS = "emoe_latents"
"""The attribute of an attention module whose keys and values are not made, since its latents are cached."""


Chosen = Mapping[int, Tensor]
"""First row of a sequence in the step -> [Q, C] the numbers of the keys that each of its rows attends to. Sequences
that are not there attend to all keys."""


class Latents(Protocol):
    """What that attribute holds: model/trunk/latent.py."""

    @property
    def value_size(self) -> int: ...

    def attend(
        self,
        batch: StepBatch,
        layer: int,
        query_NTD: Tensor,
        latent_TR: Tensor,
        rotated_TP: Tensor,
        rules: Rules,
        chosen: Chosen,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Window:
    """Stands for a mask: a layer attends to the last `size` tokens, or to all earlier tokens if `size` is None."""

    size: int | None

    def __getitem__(self, _: Any) -> Window:
        """An indexer takes the mask of one head, which is that of all heads."""
        return self


def describe_mask(*, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> Window:
    """Describe a mask instead of making it; this is transformers' mask interface.

    For some families, only the mask that a layer gets says what the layer may attend to. So the description takes the
    mask's place. Raises NotImplementedError for a model that adds rules of its own to the causal mask.
    """
    if use_vmap:
        raise NotImplementedError("attention with a mask that is neither causal nor a sliding window")
    return Window(local_size)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Window | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Chosen | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers' interface: query [1, N, T, D], key and value [1, G, T, D] -> [1, T, N, D].

    `indices` is what the layer's indexer has chosen, if it has one.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    batch = current_batch()
    latent: Latents | None = getattr(module, LATENTS, None)
    window = None if attention_mask is None else attention_mask.size
    size = value.shape[3] if latent is None else latent.value_size
    if isinstance(batch, ShapeProbe):
        batch.record(layer, key, value, softcap, window)
        return query.new_zeros(1, query.shape[2], query.shape[1], size), None
    if isinstance(batch, Deferred):
        assert not indices, "an indexer chooses keys of the step that runs"
        out = query.new_empty(1, query.shape[2], query.shape[1], size)

        def later(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return paged_attention(module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux)[0]

        batch.attend((query, key, value), out, later)
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rules = Rules(scale=scale, window=window, softcap=softcap, sinks=s_aux)
    if latent is not None:
        return latent.attend(batch, layer, query[0], key[0, 0], value[0, 0], rules, indices or {})[None], None
    assert not indices, "only layers whose latents are cached attend to chosen keys"
    batch = batch.of(layer)
    if batch.fused is not None:
        return batch.fused.attend(batch.cache.stores(layer), query[0], key[0], value[0], rules)[None], None
    return attend(batch, layer, query[0], key[0], value[0], rules)[None], None


def attend(
    batch: StepBatch,
    layer: int,
    query_NTD: Tensor,
    key_GTD: Tensor,
    value_GTD: Tensor,
    rules: Rules,
    *,
    below: int | None = None,
) -> Tensor:
    """Write the step's keys and values, and compute attention by matrix products: [T, N, D of values].

    Sequences with `below` rows or more get no output: their rows of the result are undefined.
    """
    batch.cache.write(layer, batch.positions, batch.begun, key_GTD, value_GTD)
    out_TND = query_NTD.new_empty(query_NTD.shape[1], query_NTD.shape[0], value_GTD.shape[2])
    for index, group in enumerate(batch.decodes):
        out_TND[group.rows] = _decode(batch, index, layer, query_NTD, rules)
    for part in batch.prefills:
        if below is None or part.end - part.start < below:
            attend_rows(*batch.cache.gather(layer, part.blocks), part, query_NTD, rules, out_TND)
    return out_TND


def _decode(batch: StepBatch, index: int, layer: int, query_NTD: Tensor, rules: Rules) -> Tensor:
    """Compute attention for the one query row of each sequence in a decode group: [R, N, D]."""
    group = batch.decodes[index]
    key_GLD, value_GLD = batch.cache.gather(layer, group.tables)
    heads, num = key_GLD.shape[0], len(group.rows)
    query_GRMD = query_NTD[:, group.rows].view(heads, -1, num, query_NTD.shape[-1]).transpose(1, 2)
    out_GRMD = _attend(
        query_GRMD,
        key_GLD.view(heads, num, -1, key_GLD.shape[-1]),
        value_GLD.view(heads, num, -1, value_GLD.shape[-1]),
        batch.decode_mask(index, rules.window),
        rules,
    )
    return out_GRMD.transpose(0, 1).reshape(num, -1, value_GLD.shape[-1])


def attend_rows(
    key_GLD: Tensor,
    value_GLD: Tensor,
    part: Prefill,
    query_NTD: Tensor,
    rules: Rules,
    out_TND: Tensor,
    chosen_QC: Tensor | None = None,
) -> None:
    """Compute attention for the query rows of one sequence, into `out_TND`. A tile of rows reads only the keys that it
    can see. If `chosen_QC` is given, a row attends to no other keys than these.
    """
    heads = key_GLD.shape[0]
    for first in range(part.start, part.end, _TILE):
        last = min(first + _TILE, part.end)
        low = 0 if rules.window is None else max(0, first - rules.window + 1)
        rows = slice(part.first_row + first - part.start, part.first_row + last - part.start)
        count = last - first
        row = torch.arange(first, last, device=key_GLD.device)[:, None]
        key = torch.arange(low, last, device=key_GLD.device)
        hidden = key > row
        if rules.window is not None:
            hidden |= key <= row - rules.window
        if chosen_QC is not None:
            chosen = torch.zeros(count, part.end, dtype=torch.bool, device=hidden.device)
            chosen.scatter_(1, chosen_QC[first - part.start : last - part.start], True)
            hidden |= ~chosen[:, low:last]
        mask_QL = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
        query_GMQD = query_NTD[:, rows].reshape(heads, -1, count, query_NTD.shape[-1])
        members = query_GMQD.shape[1]
        out_GMQD = _attend(
            query_GMQD.reshape(heads, 1, members * count, -1),
            key_GLD[:, None, low:last],
            value_GLD[:, None, low:last],
            mask_QL.repeat(members, 1)[None],
            rules,
        ).view(heads * members, count, -1)
        out_TND[rows] = out_GMQD.transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rules: Rules) -> Tensor:
    """Compute softmax attention of [G, R, rows, D] over [G, R, L, D]. Rows hold the M query heads of a key head in
    turn.

    Scores are in float32, as in transformers' own eager attention.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)).float().mul_(rules.scale)
    if rules.softcap is not None:
        scores = scores.div_(rules.softcap).tanh_().mul_(rules.softcap)
    scores += mask
    if rules.sinks is None:
        weights = scores.softmax(-1)
    else:
        heads, _, rows, _ = scores.shape
        members = rules.sinks.numel() // heads
        sink = rules.sinks.float().view(heads, 1, members, 1).repeat_interleave(rows // members, 2)
        padded = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1)
        weights = padded.softmax(-1)[..., :-1]
    return torch.matmul(weights.to(value.dtype), value)


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, describe_mask)
