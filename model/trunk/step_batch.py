"""The step that is being run: which of its tokens belong to which sequence, and where the sequences' keys lie.

Attention (attention.py) asks for the batch in force, because transformers' interface hands nothing else over.

Legend: T tokens of the step, R sequences decoded together, Q query rows of a tile, L keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from elastic_moe.cluster.messages.seats import LiveBlocks
from elastic_moe.model.block_tables import Piece
from elastic_moe.model.foreign_memory import borrowed
from elastic_moe.model.graph_pieces import recording
from elastic_moe.model.native.attention import NativeBatch, Rules
from elastic_moe.model.staging import to_device
from elastic_moe.model.trunk.attention_path import KVShape
from elastic_moe.model.trunk.flash import FlashBatch
from elastic_moe.model.trunk.kv_cache import KVCache


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


class Fused(Protocol):
    """Computes attention for all sequences of a step in one call per layer."""

    def attend(
        self, caches: tuple[Tensor, Tensor], query_NTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, rules: Rules
    ) -> Tensor:
        """Write the step's keys and values to a layer's caches, and attend: [T, N, D of values]."""
        ...


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
    fused: Fused | None = None
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
        windowed = cls._of_pieces([seen_by_windows(piece, cache) for piece in slices], cache, device)
        if cache.only_windows:
            return windowed
        batch = cls._of_pieces(pieces, cache, device)
        batch.windowed = windowed
        return batch

    @classmethod
    def _of_pieces(cls, pieces: Sequence[Piece], cache: KVCache, device: torch.device) -> StepBatch:
        size = cache.block_size
        fused: Fused | None = None
        if cache.path.lib is not None:
            fused = NativeBatch(cache.path.lib, pieces, block_size=size)
        elif cache.path.varlen is not None:
            kernels = cache.path.kernels
            fused = FlashBatch(cache.path.varlen, pieces, block_size=size, device=device, kernels=kernels)
        # attention over latents on GPUs is by matrix products, so those of the step are needed too
        if fused is not None and not (isinstance(fused, FlashBatch) and cache.has_latents):
            return cls.fused_by(fused, cache, pieces, device)
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

    @classmethod
    def fused_by(
        cls, fused: Fused, cache: KVCache, pieces: Sequence[Piece] = (), device: torch.device | None = None
    ) -> StepBatch:
        """A batch for which one call per layer computes attention. Layers of latents need `pieces` and `device`."""
        nothing = torch.empty(0)
        return cls(
            cache=cache,
            positions=nothing,
            begun=nothing,
            decodes=[],
            prefills=[],
            pieces=pieces,
            device=device or torch.device("cpu"),
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


def seen_by_windows(piece: SequenceSlice, cache: KVCache) -> Piece:
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


class Deferred:
    """Stands for the batches of the steps that a recording will run: attention is computed between its graphs."""

    def __init__(self) -> None:
        self.batch: StepBatch | None = None
        """Of the step that is replayed; None if it has no tokens here."""
        self.tokens = 0
        """Its tokens. The rows after them pad it."""

    def attend(self, parts: Sequence[Tensor], out: Tensor, attend: Callable[..., Tensor]) -> None:
        """Compute attention in every replay: `attend` gets `parts` [1, heads, T, D] without the rows that pad the step,
        and returns what to write into the rows of `out` [1, T, N, D]."""
        recorder = recording()
        assert recorder is not None, "attention is only deferred in a recording"
        kept, place = [borrowed(part) for part in parts], borrowed(out)

        def work() -> None:
            if self.batch is not None:
                with step_context(self.batch):
                    place[:, : self.tokens] = attend(*(part[:, :, : self.tokens] for part in kept))

        recorder.outside(work)


_current: ContextVar[StepBatch | ShapeProbe | Deferred] = ContextVar("step_batch")


def current_batch() -> StepBatch | ShapeProbe | Deferred:
    """The batch that this thread's attention calls belong to. Raises LookupError outside of a step."""
    return _current.get()


@contextmanager
def step_context(batch: StepBatch | ShapeProbe | Deferred) -> Iterator[None]:
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
