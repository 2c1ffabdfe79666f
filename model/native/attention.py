"""Computes attention over a KV cache in the native library's layout; see attention.cpp.

Legend: T tokens of the step, N query heads, G key heads, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from elastic_moe.model.block_tables import Piece

TILE = 16
"""Tokens in a tile of the cache. A block consists of whole tiles."""
CHUNK = 256
"""Keys that are taken at a time, from multiples of this number on (`kKeys` in attention.cpp)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The settings of one layer's attention."""

    scale: float
    window: int | None
    """The number of last tokens that a token attends to; None if it attends to all earlier ones."""
    softcap: float | None
    sinks: Tensor | None
    """[N] a logit for each head that is part of the softmax and has no value."""


def refusal(*, block_size: int, key_size: int, value_size: int) -> str | None:
    """Why the layout does not exist for a bfloat16 cache on CPU; None if it exists."""
    if block_size % TILE:
        return f"block_size {block_size} is not a multiple of {TILE}"
    if key_size % 2:
        return f"keys have {key_size} numbers per head, which is odd"
    if value_size % 16:
        return f"values have {value_size} numbers per head, which is not a multiple of 16"
    return None


class NativeBatch:
    """A step's sequences, in the form of the library's arguments. It is the same for all layers."""

    def __init__(self, lib: ctypes.CDLL, pieces: Sequence[Piece], *, block_size: int) -> None:
        """The tokens of the pieces follow one another in the step."""
        self.lib = lib
        used = [-(-end // block_size) for _, end, _ in pieces]
        rows = accumulate((end - start for start, end, _ in pieces), initial=0)
        tables = accumulate(used, initial=0)
        described = [[row, start, end, at] for row, (start, end, _), at in zip(rows, pieces, tables, strict=False)]
        self._sequences = torch.tensor(described, dtype=torch.int64)
        flat = [block for (_, _, blocks), n in zip(pieces, used, strict=True) for block in blocks[:n]]
        self._tables = torch.tensor(flat, dtype=torch.int32)
        self._ordered: dict[int, tuple[Tensor, int]] = {}
        """Rows -> the sequences, those with fewer rows first, and how many these are."""
        self.described = (block_size, self._sequences.data_ptr(), len(described), self._tables.data_ptr())
        """Arguments of native functions: tokens of a block, the sequences, their number, their block tables."""

    def attend(
        self,
        caches: tuple[Tensor, Tensor],
        query_NTD: Tensor,
        key_GTD: Tensor,
        value_GTD: Tensor,
        rules: Rules,
    ) -> Tensor:
        """Write the step's keys and values to a layer's caches, and compute attention: [T, N, D of values]."""
        query_NTD, key_GTD, value_GTD = (
            t if t.stride(2) == 1 else t.contiguous() for t in (query_NTD, key_GTD, value_GTD)
        )
        heads, tokens, key_size = query_NTD.shape
        value_size = value_GTD.shape[2]
        strides = [stride for t in (query_NTD, key_GTD, value_GTD) for stride in t.stride()[:2]]
        logits = None if rules.sinks is None else rules.sinks.float().contiguous()
        out_TND = torch.empty(tokens, heads, value_size, dtype=torch.bfloat16)
        self.lib.emoe_attention(
            query_NTD.data_ptr(),
            key_GTD.data_ptr(),
            value_GTD.data_ptr(),
            (ctypes.c_int64 * 6)(*strides),
            heads,
            key_GTD.shape[0],
            key_size,
            value_size,
            caches[0].data_ptr(),
            caches[1].data_ptr(),
            *self.described,
            rules.scale,
            rules.window or 0,
            rules.softcap or 0.0,
            None if logits is None else logits.data_ptr(),
            out_TND.data_ptr(),
            torch.get_num_threads(),
        )
        return out_TND

    def attend_latents(
        self, cache: Tensor, query_NTD: Tensor, key_TD: Tensor, value_size: int, rules: Rules, *, below: int
    ) -> Tensor:
        """Write the step's latents to a layer's cache, and compute attention over it: [T, N, value_size].

        Sequences with `below` rows or more get no output: their rows of the result are undefined.
        """
        query_NTD = query_NTD if query_NTD.stride(2) == 1 else query_NTD.contiguous()
        heads, tokens, key_size = query_NTD.shape
        block_size, _, count, tables = self.described
        sequences, attended = self._few_rows_first(below)
        logits = None if rules.sinks is None else rules.sinks.float().contiguous()
        out_TND = torch.empty(tokens, heads, value_size, dtype=torch.bfloat16)
        self.lib.emoe_latent_attention(
            query_NTD.data_ptr(),
            key_TD.data_ptr(),
            (ctypes.c_int64 * 3)(*query_NTD.stride()[:2], key_TD.stride(0)),
            heads,
            key_size,
            value_size,
            cache.data_ptr(),
            block_size,
            sequences.data_ptr(),
            count,
            attended,
            tables,
            rules.scale,
            rules.window or 0,
            rules.softcap or 0.0,
            None if logits is None else logits.data_ptr(),
            out_TND.data_ptr(),
            torch.get_num_threads(),
        )
        return out_TND

    def _few_rows_first(self, below: int) -> tuple[Tensor, int]:
        if below not in self._ordered:
            few = self._sequences[:, 2] - self._sequences[:, 1] < below
            self._ordered[below] = torch.cat((self._sequences[few], self._sequences[~few])), int(few.sum())
        return self._ordered[below]


def attend_apart(lib: ctypes.CDLL, query_NQD: Tensor, key_NLD: Tensor, value_NLD: Tensor, rules: Rules) -> Tensor:
    """Compute attention of the last Q of L tokens over keys that lie in no cache: [Q, N, D of values]."""
    key_NLD, value_NLD = key_NLD.contiguous(), value_NLD.contiguous()
    heads, length, key_size = key_NLD.shape
    value_size, tiles = value_NLD.shape[2], -(-length // TILE)
    keys = torch.empty(tiles, heads, TILE, key_size, dtype=torch.bfloat16)
    values = torch.empty(tiles, heads, TILE, value_size, dtype=torch.bfloat16)
    whole = torch.tensor([[0, 0, length, 0]])
    tables = torch.arange(tiles, dtype=torch.int32)
    lib.emoe_attention_write(
        key_NLD.data_ptr(),
        value_NLD.data_ptr(),
        (ctypes.c_int64 * 4)(*key_NLD.stride()[:2], *value_NLD.stride()[:2]),
        *(heads, key_size, value_size),
        keys.data_ptr(),
        values.data_ptr(),
        TILE,
        whole.data_ptr(),
        1,
        tables.data_ptr(),
        torch.get_num_threads(),
    )
    start = length - query_NQD.shape[1]
    batch = NativeBatch(lib, [(start, length, range(tiles))], block_size=TILE)
    return batch.attend((keys, values), query_NQD, key_NLD[:, start:], value_NLD[:, start:], rules)


def unpack_latents(blocks_PBD: Tensor) -> Tensor:
    """The keys [P * B, D] of blocks of a cache of latents, which are in the library's layout: tiles of [D/2][16][2]."""
    blocks, size, width = blocks_PBD.shape
    tiles = blocks_PBD.view(blocks * size // TILE, width // 2, TILE, 2)
    return tiles.transpose(1, 2).reshape(blocks * size, width)
