"""Attention of a packed step over the paged KV cache, behind transformers' attention interface.

The trunk passes q, k, v of all tokens of the step as one row [1, heads, T, D]. The `StepBatch` in force says which
tokens belong to which sequence and where the sequence's keys lie. Sliding windows, sinks and soft-caps are supported.
The native library computes attention in bfloat16 on CPU if it is available, and FlashAttention (model/trunk/flash.py)
in 16 bits on CUDA. Otherwise this file computes it by matrix products.

Legend: T tokens of the step, R sequences decoded together, Q query rows of a tile, L keys, N query heads,
G key heads, M = N/G query heads per key head, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from elastic_moe.model.native.attention import NativeBatch, Rules
from elastic_moe.model.trunk.attention_path import KVShape
from elastic_moe.model.trunk.flash import FlashBatch
from elastic_moe.model.trunk.kv_cache import KVCache

NAME = "emoe"
"""The name of our attention function in transformers' registry."""

_TILE = 128
"""Query rows of a prefill that are computed at a time, which bounds the memory of the scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSlice:
    """The tokens of one sequence in a step, at positions start .. start + len(token_ids) - 1."""

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    """The sequence's block table from its first block up to at least its last token of this step."""
    prompt_length: int
    """Tokens of the sequence's prompt. Length-dependent rotary embeddings depend on it."""
    wants_logits: bool = True
    """Whether logits of the last token are needed."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(slots=True)
class _DecodeGroup:
    """Sequences with one query row each and about equally many blocks, which are computed together."""

    rows: Tensor
    """[R] index of each sequence's token in the step."""
    tables: Tensor
    """[R * blocks] block ids, padded with the sequence's own last block: a block of another sequence may hold
    infinities, which a mask does not remove.
    """
    lengths: Tensor
    """[R] keys of each sequence."""


@dataclass(slots=True)
class _Prefill:
    first_row: int
    start: int
    end: int
    blocks: Tensor


@dataclass(slots=True)
class StepBatch:
    """The step's sequences, packed: what the attention function needs beyond q, k and v."""

    cache: KVCache
    positions: Tensor
    """[T] the place of each token's key in the cache: block * block_size + offset."""
    begun: Tensor
    """Blocks that get their first token in this step and do not become full: they still hold another sequence's keys.
    """
    decodes: list[_DecodeGroup]
    prefills: list[_Prefill]
    fused: NativeBatch | FlashBatch | None = None
    """If set, one call computes attention for all sequences, and the fields above are empty."""
    dispatcher: Any = None
    """The dispatcher of the step, for layers that run in one call (model/fitting/whole_stack.py)."""
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """Additive masks of decode groups, by (group, window). They are the same for every layer."""

    @classmethod
    def build(cls, slices: Sequence[SequenceSlice], cache: KVCache, device: torch.device) -> StepBatch:
        size = cache.block_size
        pieces = [(piece.start, piece.end, piece.block_ids) for piece in slices]
        fused: NativeBatch | FlashBatch | None = None
        if cache.path.lib is not None:
            fused = NativeBatch(cache.path.lib, pieces, block_size=size)
        elif cache.path.varlen is not None:
            fused = FlashBatch(cache.path.varlen, pieces, block_size=size, device=device)
        if fused is not None:
            nothing = torch.empty(0)
            return cls(cache=cache, positions=nothing, begun=nothing, decodes=[], prefills=[], fused=fused)
        positions: list[int] = []
        begun: list[int] = []
        decodes: list[tuple[int, int, SequenceSlice]] = []
        prefills: list[_Prefill] = []
        for piece in slices:
            used = -(-piece.end // size)
            if len(piece.token_ids) == 1:
                # sequences are grouped by powers of two, so that padding at most doubles the keys that are read
                decodes.append(((used - 1).bit_length(), len(positions), piece))
            else:
                blocks = torch.tensor(piece.block_ids[:used], device=device)
                prefills.append(_Prefill(first_row=len(positions), start=piece.start, end=piece.end, blocks=blocks))
            positions += [piece.block_ids[p // size] * size + p % size for p in range(piece.start, piece.end)]
            if piece.end % size and piece.end // size * size >= piece.start:
                begun.append(piece.block_ids[piece.end // size])
        decodes.sort(key=lambda item: item[:2])
        groups = [_decode_group(list(items), size, device) for _, items in groupby(decodes, key=lambda item: item[0])]
        return cls(
            cache=cache,
            positions=torch.tensor(positions, device=device),
            begun=torch.tensor(begun, dtype=torch.int64, device=device),
            decodes=groups,
            prefills=prefills,
        )

    def decode_mask(self, index: int, window: int | None) -> Tensor:
        """[R, 1, L] 0 where a key counts, -inf where it is padding or outside the window."""
        mask = self.masks.get((index, window))
        if mask is None:
            group = self.decodes[index]
            key = torch.arange(len(group.tables) // len(group.rows) * self.cache.block_size, device=group.rows.device)
            valid = key < group.lengths[:, None]
            if window is not None:
                valid &= key >= group.lengths[:, None] - window
            mask = torch.zeros(valid.shape, dtype=torch.float32, device=valid.device)
            mask = mask.masked_fill_(~valid, float("-inf"))[:, None]
            self.masks[(index, window)] = mask
        return mask


def _decode_group(items: Sequence[tuple[int, int, SequenceSlice]], size: int, device: torch.device) -> _DecodeGroup:
    widest = max(-(-piece.end // size) for _, _, piece in items)
    tables: list[int] = []
    for _, _, piece in items:
        used = list(piece.block_ids[: -(-piece.end // size)])
        tables += used + used[-1:] * (widest - len(used))
    lengths = [piece.end for _, _, piece in items]
    return _DecodeGroup(
        rows=torch.tensor([row for _, row, _ in items], device=device),
        tables=torch.tensor(tables, device=device),
        lengths=torch.tensor(lengths, device=device),
    )


_current: ContextVar[StepBatch | ShapeProbe] = ContextVar("step_batch")


def current_batch() -> StepBatch | ShapeProbe:
    """The batch that this thread's attention calls belong to. Raises LookupError outside of a step."""
    return _current.get()


@contextmanager
def step_context(batch: StepBatch | ShapeProbe) -> Iterator[None]:
    """While the block runs, attention calls of this thread belong to `batch`."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


class ShapeProbe:
    """Stands for a batch in one forward pass, and records each layer's KV shape."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}

    def record(self, layer: int, key: Tensor, value: Tensor, softcap: float | None) -> None:
        self.shapes[layer] = KVShape(
            num_heads=key.shape[1], key_size=key.shape[3], value_size=value.shape[3], softcap=softcap is not None
        )


@dataclass(frozen=True, slots=True)
class Window:
    """Stands for a mask: a layer attends to the last `size` tokens, or to all earlier tokens if `size` is None."""

    size: int | None


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
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers' interface: query [1, N, T, D], key and value [1, G, T, D] -> [1, T, N, D]."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    batch = _current.get()
    if isinstance(batch, ShapeProbe):
        batch.record(layer, key, value, softcap)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if attention_mask is None else attention_mask.size
    rules = Rules(scale=scale, window=window, softcap=softcap, sinks=s_aux)
    if batch.fused is not None:
        return batch.fused.attend(batch.cache.stores(layer), query[0], key[0], value[0], rules)[None], None
    batch.cache.write(layer, batch.positions, batch.begun, key[0], value[0])
    query_NTD = query[0]
    out_TND = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for index, group in enumerate(batch.decodes):
        out_TND[group.rows] = _decode(batch, index, layer, query_NTD, rules)
    for prefill in batch.prefills:
        _prefill(batch, prefill, layer, query_NTD, rules, out_TND)
    return out_TND[None], None


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


def _prefill(batch: StepBatch, part: _Prefill, layer: int, query_NTD: Tensor, rules: Rules, out_TND: Tensor) -> None:
    """Compute attention for the query rows of one sequence. A tile of rows reads only the keys that it can see."""
    key_GLD, value_GLD = batch.cache.gather(layer, part.blocks)
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
