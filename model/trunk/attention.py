"""Attention of a packed step over the paged KV cache, behind transformers' attention interface.

The trunk passes q, k, v of all tokens of the step as one row [1, heads, T, D]. The `StepBatch` in force says which
tokens belong to which sequence and where the sequence's keys lie. Sliding windows, sinks and soft-caps are supported.
The native library computes attention in bfloat16 on CPU if it is available, and FlashAttention (model/trunk/flash.py)
in 16 bits on CUDA. Otherwise this file computes it by matrix products.

Legend: T tokens of the step, R sequences decoded together, Q query rows of a tile, L keys, N query heads,
G key heads, M = N/G query heads per key head, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from elastic_moe.cluster.messages.seats import LiveBlocks
from elastic_moe.model.native.attention import NativeBatch, Rules
from elastic_moe.model.staging import to_device
from elastic_moe.model.trunk.attention_path import KVShape
from elastic_moe.model.trunk.flash import FlashBatch, Piece
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
    windows: LiveBlocks | None = None
    """Its blocks in layers with a sliding window; None: the same as in the other layers."""
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
class Prefill:
    """The rows of one sequence, at positions start .. end - 1."""

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
    prefills: list[Prefill]
    pieces: Sequence[Piece]
    """The sequences, whose tokens follow one another in the step."""
    device: torch.device
    fused: NativeBatch | FlashBatch | None = None
    """If set, one call computes attention for all sequences, and the fields above are empty."""
    dispatcher: Any = None
    """The dispatcher of the step, for layers that run in one call (model/fitting/whole_stack.py)."""
    windowed: StepBatch | None = None
    """The same sequences for the layers of `cache.windows`, if there are such layers and others."""
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """Additive masks of decode groups, by (group, window). They are the same for every layer."""
    splits: dict[int, tuple[list[Prefill], Tensor | None]] = field(default_factory=dict)
    """What `split` has found."""
    _longer: dict[int, list[Prefill]] = field(default_factory=dict)
    _places: Tensor | None = None

    @classmethod
    def build(cls, slices: Sequence[SequenceSlice], cache: KVCache, device: torch.device) -> StepBatch:
        pieces = [(piece.start, piece.end, piece.block_ids) for piece in slices]
        if cache.windows is None:
            return cls._of_pieces(pieces, cache, device)
        windowed = cls._of_pieces([_seen(piece, cache) for piece in slices], cache, device)
        if cache.only_windows:
            return windowed
        batch = cls._of_pieces(pieces, cache, device)
        batch.windowed = windowed
        return batch

    @classmethod
    def _of_pieces(cls, pieces: Sequence[Piece], cache: KVCache, device: torch.device) -> StepBatch:
        size = cache.block_size
        fused: NativeBatch | FlashBatch | None = None
        if cache.path.lib is not None:
            fused = NativeBatch(cache.path.lib, pieces, block_size=size)
        elif cache.path.varlen is not None:
            fused = FlashBatch(cache.path.varlen, pieces, block_size=size, device=device)
        # attention over latents on GPUs is by matrix products, so those of the step are needed too
        if fused is not None and not (isinstance(fused, FlashBatch) and cache.has_latents):
            nothing = torch.empty(0)
            return cls(
                cache=cache,
                positions=nothing,
                begun=nothing,
                decodes=[],
                prefills=[],
                pieces=pieces,
                device=device,
                fused=fused,
            )
        places = [b[p // size] * size + p % size for start, end, b in pieces for p in range(start, end)]
        begun = [b[end // size] for start, end, b in pieces if end % size and end // size * size >= start]
        # sequences are grouped by powers of two, so that padding at most doubles the keys that are read
        decodes = sorted(
            ((-(-end // size) - 1).bit_length(), row) for row, (start, end, _) in _rows(pieces) if end - start == 1
        )
        alone = dict(_rows(pieces))
        grouped = [[(row, alone[row]) for _, row in items] for _, items in groupby(decodes, key=lambda item: item[0])]
        arrays = [places, begun, *(array for items in grouped for array in _decode_arrays(items, size))]
        positions, cleared, *parts = to_device([np.array(numbers, dtype=np.int64) for numbers in arrays], device)
        return cls(
            cache=cache,
            positions=positions,
            begun=cleared,
            decodes=[_DecodeGroup(*parts[3 * n : 3 * n + 3]) for n in range(len(grouped))],
            prefills=[part for part in _prefills(pieces, size, device) if part.end - part.start > 1],
            pieces=pieces,
            device=device,
            fused=fused,
        )

    def of(self, layer: int) -> StepBatch:
        """The batch as a layer sees it."""
        windows = self.cache.windows
        return self if self.windowed is None or windows is None or layer not in windows.layers else self.windowed

    @property
    def places(self) -> Tensor:
        """[T] the place of each token's key in the cache, also if one call computes attention for all sequences."""
        if self.fused is None:
            return self.positions
        if self._places is None:
            size = self.cache.block_size
            places = [b[p // size] * size + p % size for start, end, b in self.pieces for p in range(start, end)]
            [self._places] = to_device([np.array(places, dtype=np.int64)], self.device)
        return self._places

    def longer(self, keys: int) -> list[Prefill]:
        """The sequences that have more keys than that."""
        if keys not in self._longer:
            parts = _prefills(self.pieces, self.cache.block_size, self.device)
            self._longer[keys] = [part for part in parts if part.end > keys]
        return self._longer[keys]

    def split(self, rows: int) -> tuple[list[Prefill], Tensor | None]:
        """The sequences that have at least so many rows, and the numbers of all other rows (None: all rows)."""
        if rows not in self.splits:
            parts = self.prefills
            if self.fused is not None:
                parts = _prefills(self.pieces, self.cache.block_size, self.device)
            wide = [part for part in parts if part.end - part.start >= rows]
            self.splits[rows] = wide, self._others(wide) if wide else None
        return self.splits[rows]

    def _others(self, parts: Sequence[Prefill]) -> Tensor:
        """The numbers of the rows that belong to none of the parts."""
        other = np.ones(sum(end - start for start, end, _ in self.pieces), dtype=np.bool_)
        for part in parts:
            other[part.first_row : part.first_row + part.end - part.start] = False
        [rows] = to_device([other.nonzero()[0]], self.device)
        return rows

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


def _seen(piece: SequenceSlice, cache: KVCache) -> Piece:
    """The sequence as layers with a window see it."""
    assert cache.windows is not None
    blocks = piece.windows
    first, ids = (0, piece.block_ids) if blocks is None else (blocks.first, blocks.ids)
    return cache.windows.seen(piece.start, piece.end, first, ids, cache.block_size)


def _rows(pieces: Sequence[Piece]) -> Iterator[tuple[int, Piece]]:
    """Each sequence with the number of its first row in the step."""
    return zip(accumulate((end - start for start, end, _ in pieces), initial=0), pieces, strict=False)


def _prefills(pieces: Sequence[Piece], size: int, device: torch.device) -> list[Prefill]:
    tables = [np.array(blocks[: -(-end // size)], dtype=np.int64) for _, end, blocks in pieces]
    return [
        Prefill(first_row=row, start=start, end=end, blocks=blocks)
        for (row, (start, end, _)), blocks in zip(_rows(pieces), to_device(tables, device), strict=True)
    ]


def _decode_arrays(items: Sequence[tuple[int, Piece]], size: int) -> tuple[list[int], list[int], list[int]]:
    """Rows, tables and lengths of a decode group."""
    widest = max(-(-end // size) for _, (_, end, _) in items)
    tables: list[int] = []
    for _, (_, end, blocks) in items:
        used = list(blocks[: -(-end // size)])
        tables += used + used[-1:] * (widest - len(used))
    return [row for row, _ in items], tables, [end for _, (_, end, _) in items]


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

    def record(self, layer: int, key: Tensor, value: Tensor, softcap: float | None, window: int | None) -> None:
        self.shapes[layer] = KVShape(
            num_heads=key.shape[1],
            key_size=key.shape[3],
            value_size=value.shape[3],
            softcap=softcap is not None,
            window=window,
        )


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
    batch = _current.get()
    latent: Latents | None = getattr(module, LATENTS, None)
    window = None if attention_mask is None else attention_mask.size
    if isinstance(batch, ShapeProbe):
        size = value.shape[3] if latent is None else latent.value_size
        batch.record(layer, key, value, softcap, window)
        return query.new_zeros(1, query.shape[2], query.shape[1], size), None
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
