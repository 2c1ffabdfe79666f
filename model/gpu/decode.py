"""Attention of one query row per sequence over a paged cache [P, B, G, D], of any block size.

The keys of a sequence are divided into splits that run side by side, and a second kernel joins the splits (the scheme
is Flash-Decoding, https://pytorch.org/blog/flash-decoding/). Lengths and tables are read on the device, so that a CUDA
graph of a step serves steps of other lengths.

Legend: T tokens of the step, R sequences, N query heads, G key heads, M = N/G, D head size, P blocks, B tokens per
block, C blocks of a table, S splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_moe.model.block_tables import Piece, block_tables
from elastic_moe.model.native.attention import Rules
from elastic_moe.model.staging import to_device

_WAVES = 4
"""Programs for each multiprocessor that a step of few sequences is divided into."""
_MOST_SPLITS = 32
_KEYS = 64
"""Keys that a program takes at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """Sequences that have one token each in a step."""

    rows_R: Tensor | None
    """[R] int64 number of each sequence's token in the step; None if the step has no other tokens."""
    tables_RC: Tensor
    """[R, C] int64 block ids of each sequence. Entries beyond its last key may be anything."""
    keys_R: Tensor
    """[R] int64 keys of each sequence, its new one included. 0 stands for no sequence: nothing is written for it."""

    def attend(
        self,
        caches: tuple[Tensor, Tensor],
        query_NTD: Tensor,
        key_GTD: Tensor,
        value_GTD: Tensor,
        rules: Rules,
        out_TND: Tensor,
    ) -> None:
        """Write the rows' keys and values to a layer's caches, and their attention to `out_TND`."""
        num, columns = self.tables_RC.shape
        keys, values = caches
        block_size, groups, key_size = keys.shape[1:]
        value_size = values.shape[3]
        members = query_NTD.shape[0] // groups
        rows = self.rows_R
        # without rows, kernels read no numbers of rows
        picked = self.keys_R if rows is None else rows
        _write[(num, groups)](
            keys,
            values,
            key_GTD,
            value_GTD,
            picked,
            self.tables_RC,
            self.keys_R,
            columns,
            key_GTD.stride(0),
            key_GTD.stride(1),
            value_GTD.stride(0),
            value_GTD.stride(1),
            groups,
            PICKS=rows is not None,
            PAGE=block_size,
            KEY=key_size,
            VALUE=value_size,
            BLOCK_K=triton.next_power_of_2(key_size),
            BLOCK_V=triton.next_power_of_2(value_size),
        )
        processors = _processors(keys.device)
        splits = max(1, min(_MOST_SPLITS, _WAVES * processors // max(1, num * groups)))
        rounds = max(16, triton.next_power_of_2(members))
        partial = torch.empty(num, groups, splits, members, value_size, dtype=torch.float32, device=keys.device)
        sums = torch.empty(2, num, groups, splits, members, dtype=torch.float32, device=keys.device)
        _attend[(num, groups, splits)](
            query_NTD,
            keys,
            values,
            picked,
            self.tables_RC,
            self.keys_R,
            partial,
            sums,
            columns,
            query_NTD.stride(0),
            query_NTD.stride(1),
            groups,
            splits,
            sums.stride(0),
            rules.scale,
            rules.window or 0,
            rules.softcap or 0.0,
            PICKS=rows is not None,
            WINDOWED=rules.window is not None,
            CAPPED=rules.softcap is not None,
            PAGE=block_size,
            MEMBERS=members,
            ROWS=rounds,
            KEY=key_size,
            VALUE=value_size,
            BLOCK_K=triton.next_power_of_2(key_size),
            BLOCK_V=triton.next_power_of_2(value_size),
            KEYS=_KEYS,
        )
        _join[(num, query_NTD.shape[0])](
            partial,
            sums,
            picked,
            self.keys_R if rules.sinks is None else rules.sinks,
            out_TND,
            sums.stride(0),
            out_TND.stride(0),
            out_TND.stride(1),
            groups,
            splits,
            PICKS=rows is not None,
            SINKS=rules.sinks is not None,
            MEMBERS=members,
            VALUE=value_size,
            BLOCK_S=_MOST_SPLITS,
            BLOCK_V=triton.next_power_of_2(value_size),
        )


def decode_rows(
    pieces: Sequence[Piece],
    rows: npt.NDArray[np.int64] | None,
    *,
    block_size: int,
    device: torch.device,
) -> DecodeRows:
    """The sequences, which have one token each. `rows` as in DecodeRows."""
    ends = np.array([end for _, end, _ in pieces], dtype=np.int64)
    tables = block_tables(pieces, block_size)
    arrays = [tables, ends] if rows is None else [tables, ends, rows]
    tables_RC, keys_R, *places = to_device(arrays, device)
    return DecodeRows(rows_R=places[0] if places else None, tables_RC=tables_RC, keys_R=keys_R)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _write(
    keys,
    values,
    key,
    value,
    rows,
    tables,
    lengths,
    columns,
    key_head,
    key_token,
    value_head,
    value_token,
    groups,
    PICKS: tl.constexpr,
    PAGE: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    sequence = tl.program_id(0)
    group = tl.program_id(1)
    length = tl.load(lengths + sequence)
    token = tl.load(rows + sequence) if PICKS else sequence.to(tl.int64)
    at = tl.maximum(length - 1, 0)
    page = tl.load(tables + sequence * columns + at // PAGE)
    place = (page * PAGE + at % PAGE) * groups + group
    column = tl.arange(0, BLOCK_K)
    here = (column < KEY) & (length > 0)
    numbers = tl.load(key + group * key_head + token * key_token + column, mask=here)
    tl.store(keys + place * KEY + column, numbers, mask=here)
    column = tl.arange(0, BLOCK_V)
    here = (column < VALUE) & (length > 0)
    numbers = tl.load(value + group * value_head + token * value_token + column, mask=here)
    tl.store(values + place * VALUE + column, numbers, mask=here)


@triton.jit(do_not_specialize=["splits", "plane"])
def _attend(
    query,
    keys,
    values,
    rows,
    tables,
    lengths,
    partial,
    sums,
    columns,
    query_head,
    query_token,
    groups,
    splits,
    plane,
    scale,
    window,
    softcap,
    PICKS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PAGE: tl.constexpr,
    MEMBERS: tl.constexpr,
    ROWS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEYS: tl.constexpr,
):
    sequence = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + sequence).to(tl.int32)
    first = 0
    if WINDOWED:
        first = tl.maximum(0, length - window)
    # splits begin at multiples of KEYS
    first_tile = first // KEYS
    tiles = tl.cdiv(length, KEYS) - first_tile
    share = tl.cdiv(tiles, splits)
    begin = (first_tile + split * share) * KEYS
    end = tl.minimum(begin + share * KEYS, length)
    token = tl.load(rows + sequence) if PICKS else sequence.to(tl.int64)
    member = tl.arange(0, ROWS)
    k_column = tl.arange(0, BLOCK_K)
    v_column = tl.arange(0, BLOCK_V)
    q = tl.load(
        query + (group * MEMBERS + member)[:, None] * query_head + token * query_token + k_column[None, :],
        mask=(member < MEMBERS)[:, None] & (k_column < KEY)[None, :],
        other=0.0,
    )
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_V), dtype=tl.float32)
    for at in range(begin, end, KEYS):
        position = at + tl.arange(0, KEYS)
        there = position < end
        seen = there
        if WINDOWED:
            seen = seen & (position >= first)
        page = tl.load(tables + sequence.to(tl.int64) * columns + position // PAGE, mask=there, other=0)
        place = (page * PAGE + position % PAGE) * groups + group
        k = tl.load(
            keys + place[None, :] * KEY + k_column[:, None], mask=there[None, :] & (k_column < KEY)[:, None], other=0.0
        )
        score = tl.dot(q, k) * scale
        if CAPPED:
            # tanh(x) = 2 * sigmoid(2 x) - 1
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        score = tl.where(seen[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        # a tile before the window has no key at all
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        power = tl.exp(score - base[:, None])
        fade = tl.exp(top - base)
        v = tl.load(
            values + place[:, None] * VALUE + v_column[None, :],
            mask=seen[:, None] & (v_column < VALUE)[None, :],
            other=0.0,
        )
        mixed = mixed * fade[:, None] + tl.dot(power.to(v.dtype), v)
        total = total * fade + tl.sum(power, 1)
        top = new_top
    line = ((sequence.to(tl.int64) * groups + group) * splits + split) * MEMBERS + member
    inside = member < MEMBERS
    tl.store(sums + line, top, mask=inside)
    tl.store(sums + plane + line, total, mask=inside)
    tl.store(
        partial + line[:, None] * VALUE + v_column[None, :],
        mixed,
        mask=inside[:, None] & (v_column < VALUE)[None, :],
    )


@triton.jit(do_not_specialize=["splits", "plane"])
def _join(
    partial,
    sums,
    rows,
    sinks,
    out,
    plane,
    out_token,
    out_head,
    groups,
    splits,
    PICKS: tl.constexpr,
    SINKS: tl.constexpr,
    MEMBERS: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.load(rows + sequence) if PICKS else sequence
    split = tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_V)
    line = ((sequence * groups + head // MEMBERS) * splits + split) * MEMBERS + head % MEMBERS
    top = tl.load(sums + line, mask=split < splits, other=float("-inf"))
    total = tl.load(sums + plane + line, mask=split < splits, other=0.0)
    highest = tl.max(top, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        highest = tl.maximum(highest, sink)
    # no sequence: there is nothing to join
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    share = tl.exp(top - highest)
    below = tl.sum(total * share, 0)
    if SINKS:
        below += tl.exp(sink - highest)
    mixed = tl.load(
        partial + line[:, None] * VALUE + column[None, :],
        mask=(split < splits)[:, None] & (column < VALUE)[None, :],
        other=0.0,
    )
    joined = tl.sum(mixed * share[:, None], 0) / tl.where(below > 0.0, below, 1.0)
    tl.store(out + token * out_token + head * out_head + column, joined.to(out.dtype.element_ty), mask=column < VALUE)
