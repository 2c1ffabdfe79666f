"""Attention over the paged KV cache by torch's own variable-length FlashAttention, on CUDA in 16 bits.

The abilities of torch and its kernels change with every release, so they are found by trial calls. If the kernels
accept pages of our size, they read keys and values where these lie (FlashAttention 2 needs a multiple of 256 tokens).
Otherwise keys and values are gathered first. Sinks are added afterwards, from the logarithm of the softmax's sum.
Sequences with one token in the step go to a kernel of this project (model/gpu/decode.py), which reads blocks of any
size where they lie. Nothing here makes the CPU wait for the GPU.

Legend: T tokens of the step, N query heads, G key heads, D head size, R sequences, L keys of all sequences, P blocks,
B tokens per block.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.model.block_tables import Piece, block_tables
from elastic_moe.model.native.attention import Rules
from elastic_moe.model.staging import to_device
from elastic_moe.model.torch_private import varlen
from elastic_moe.model.trunk.attention_path import KVShape, VarlenVariant

if TYPE_CHECKING:
    from elastic_moe.model.gpu.decode import DecodeRows

log = logging.getLogger(__name__)

VARIANTS = tuple(
    VarlenVariant(paged=paged, passes_begins=passes_begins, sums_by_token=sums_by_token)
    for paged, passes_begins in ((True, False), (True, True), (False, True))
    for sums_by_token in (False, True)
)
"""All ways of calling the kernels, best first."""


class FlashBatch:
    """A step's sequences. It is the same for all layers."""

    def __init__(
        self, variant: VarlenVariant, pieces: Sequence[Piece], *, block_size: int, device: torch.device, kernels: bool
    ) -> None:
        """The tokens of the pieces follow one another in the step. `kernels` as in AttentionPath."""
        self._single: DecodeRows | None = None
        self._rows_T: Tensor | None = None
        """[T] number of each token in the step that FlashAttention attends for; None: all of them."""
        single = [n for n, (start, end, _) in enumerate(pieces) if end - start == 1] if kernels else []
        if single:
            from elastic_moe.model.gpu.decode import decode_rows  # Triton, which it needs, is there only on GPUs

            counts = [end - start for start, end, _ in pieces]
            begins = np.fromiter(accumulate(counts, initial=0), dtype=np.int64)
            others = [n for n, count in enumerate(counts) if count > 1]
            self._single = decode_rows(
                [pieces[n] for n in single], begins[single] if others else None, block_size=block_size, device=device
            )
            pieces = [pieces[n] for n in others]
            if others:
                rows = np.concatenate([np.arange(begins[n], begins[n + 1]) for n in others])
                [self._rows_T] = to_device([rows], device)
        self._varlen = _VarlenBatch(variant, pieces, block_size=block_size, device=device) if pieces else None

    def attend(
        self, caches: tuple[Tensor, Tensor], query_NTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, rules: Rules
    ) -> Tensor:
        """Write the step's keys and values to a layer's caches [P, B, G, D], and attend: [T, N, D of values]."""
        new = (query_NTD, key_GTD, value_GTD)
        if self._single is None:
            assert self._varlen is not None
            return self._varlen.attend(caches, *new, rules)
        out_TND = query_NTD.new_empty(query_NTD.shape[1], query_NTD.shape[0], value_GTD.shape[2])
        self._single.attend(caches, *new, rules, out_TND)
        if self._varlen is not None:
            rows_T = self._rows_T
            assert rows_T is not None
            query, key, value = (tensor.index_select(1, rows_T) for tensor in new)
            out_TND.index_copy_(0, rows_T, self._varlen.attend(caches, query, key, value, rules))
        return out_TND


class _VarlenBatch:
    """Sequences in the form of the kernels' arguments."""

    def __init__(
        self, variant: VarlenVariant, pieces: Sequence[Piece], *, block_size: int, device: torch.device
    ) -> None:
        self._variant = variant
        # newer versions of torch need this argument for grouped heads
        known = inspect.signature(varlen.varlen_attn).parameters
        self._options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
        counts = np.array([end - start for start, end, _ in pieces])
        ends = np.array([end for _, end, _ in pieces])
        table_RP = block_tables(pieces, block_size)
        begins = [np.fromiter(accumulate(sizes, initial=0), dtype=np.int64) for sizes in (counts, ends)]
        # the place of each token's key: block * block size + offset
        sequence_T = np.arange(len(pieces)).repeat(counts)
        position_T = np.arange(counts.sum()) - (begins[0][1:] - ends)[sequence_T]
        write_T = table_RP[sequence_T, position_T // block_size] * block_size + position_T % block_size
        table, begin_q, begin_k, length, self._write_T = to_device([table_RP, *begins, ends, write_T], device)
        self._begin_q, self._begin_k, self._length_R = begin_q.int(), begin_k.int(), length.int()
        self._max_q, self._max_k = int(counts.max()), int(ends.max())
        if variant.paged:
            self._table_RP = table.int()
        else:
            total = int(ends.sum())
            sequence_L = torch.arange(len(pieces), device=device).repeat_interleave(length, output_size=total)
            position_L = torch.arange(total, device=device) - begin_k[sequence_L]
            block_L = table[sequence_L, position_L.div(block_size, rounding_mode="floor")]
            self._read_L = block_L * block_size + position_L.remainder(block_size)

    def attend(
        self, caches: tuple[Tensor, Tensor], query_NTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, rules: Rules
    ) -> Tensor:
        """As FlashBatch.attend."""
        for cache, new_GTD in zip(caches, (key_GTD, value_GTD), strict=True):
            cache.flatten(0, 1).index_copy_(0, self._write_T, new_GTD.transpose(0, 1))
        if self._variant.paged:
            keys, values = caches
            where: dict[str, Any] = {"block_table": self._table_RP, "seqused_k": self._length_R}
        else:
            keys, values = (cache.flatten(0, 1).index_select(0, self._read_L) for cache in caches)
            where = {}
        size = value_GTD.shape[-1]
        if not self._variant.paged and size < keys.shape[-1]:
            values = F.pad(values, (0, keys.shape[-1] - size))
        query_TND = query_NTD.transpose(0, 1)
        out_TND, sums = varlen.varlen_attn(
            query_TND if query_TND.stride(-1) == 1 else query_TND.contiguous(),
            keys,
            values,
            self._begin_q,
            self._begin_k if self._variant.passes_begins else None,
            self._max_q,
            self._max_k,
            return_aux=varlen.AuxRequest(lse=True),
            scale=rules.scale,
            window_size=(-1, 0) if rules.window is None else (rules.window - 1, 0),
            **where,
            **self._options,
        )
        if rules.sinks is not None:
            # a sink adds exp(sink) to the softmax's sum, so it scales the output by exp(sum) / (exp(sum) + exp(sink))
            sums_TN = sums if self._variant.sums_by_token else sums.transpose(0, 1)
            share_TN = torch.sigmoid(sums_TN - rules.sinks.float())
            out_TND = (out_TND.float() * share_TN[..., None]).to(out_TND.dtype)
        return out_TND[..., :size]


def find_variant(
    shapes: Iterable[KVShape], *, dtype: torch.dtype, device: torch.device, block_size: int
) -> VarlenVariant | str:
    """The best variant that gives right results for caches of these shapes; otherwise the reason why none does."""
    if device.type != "cuda":
        return "FlashAttention is for CUDA GPUs"
    if dtype not in (torch.bfloat16, torch.float16):
        return "FlashAttention computes in 16 bits"
    return try_variants(shapes, dtype=dtype, device=device, block_size=block_size)


def try_variants(
    shapes: Iterable[KVShape], *, dtype: torch.dtype, device: torch.device, block_size: int
) -> VarlenVariant | str:
    """Try the variants as `find_variant` does, on any device and in any dtype."""
    distinct = set(shapes)
    if any(shape.softcap for shape in distinct):
        return "FlashAttention does not bound scores, as this model does"
    for variant in VARIANTS:
        try:
            if all(_is_right(variant, shape, dtype, device, block_size) for shape in distinct):
                return variant
        except (RuntimeError, TypeError, ValueError, AttributeError):  # this torch lacks it, or it refuses these sizes
            continue
    return "no way of calling torch's FlashAttention gave right results on this device"


@torch.inference_mode()
def singles_are_right(shapes: Iterable[KVShape], *, dtype: torch.dtype, device: torch.device, block_size: int) -> bool:
    """Whether the kernel for single tokens gives right results for caches of these shapes."""
    pieces: list[Piece] = [(block_size + 2, block_size + 3, (3, 1)), (1, 2, (2,))]
    try:
        batch = FlashBatch(VARIANTS[0], pieces, block_size=block_size, device=device, kernels=True)
        return all(_attends(batch, pieces, shape, dtype, device, block_size) for shape in set(shapes))
    except Exception as error:  # noqa: BLE001 - Triton raises errors of many kinds, for sizes that are too large too
        log.warning("single tokens do not get a kernel of their own: %s", error)
        return False


@torch.inference_mode()
def _is_right(
    variant: VarlenVariant, shape: KVShape, dtype: torch.dtype, device: torch.device, block_size: int
) -> bool:
    """Try a decode in one sequence and a chunk in the middle of another."""
    first, chunk = block_size + 3, 2 * shape.num_heads + 2
    pieces: list[Piece] = [(first - 1, first, (3, 1)), (4, 4 + chunk, tuple(range(4, 5 + (4 + chunk) // block_size)))]
    batch = _VarlenBatch(variant, pieces, block_size=block_size, device=device)
    return _attends(batch, pieces, shape, dtype, device, block_size)


def _attends(
    batch: FlashBatch | _VarlenBatch,
    pieces: Sequence[Piece],
    shape: KVShape,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
) -> bool:
    """Whether the batch of these sequences gives right results, with and without window and sinks."""
    g = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g).to(device, dtype)

    groups, heads = shape.num_heads, 2 * shape.num_heads
    tokens = sum(end - start for start, end, _ in pieces)
    blocks = 1 + max(block for _, _, table in pieces for block in table)
    caches = draw(blocks, block_size, groups, shape.key_size), draw(blocks, block_size, groups, shape.value_size)
    query, key = draw(heads, tokens, shape.key_size), draw(groups, tokens, shape.key_size)
    value = draw(groups, tokens, shape.value_size)
    for window, sinks in ((None, None), (3, None), (None, draw(heads).float())):
        rules = Rules(scale=shape.key_size**-0.5, window=window, softcap=None, sinks=sinks)
        got = batch.attend(caches, query, key, value, rules)
        row = 0
        for start, end, table in pieces:
            count = end - start
            keys, values = (cache[list(table)].flatten(0, 1)[:end].transpose(0, 1) for cache in caches)
            want = _plain(query[:, row : row + count], keys, values, rules)
            if not torch.allclose(got[row : row + count].float(), want, atol=0.03, rtol=0.03):
                return False
            row += count
    return True


def _plain(query_NQD: Tensor, key_GLD: Tensor, value_GLD: Tensor, rules: Rules) -> Tensor:
    """Compute attention of one sequence's last Q tokens in float32: [Q, N, D]."""
    members = len(query_NQD) // len(key_GLD)
    key_NLD, value_NLD = (t.float().repeat_interleave(members, 0) for t in (key_GLD, value_GLD))
    scores_NQL = query_NQD.float() @ key_NLD.transpose(1, 2) * rules.scale
    count, length = scores_NQL.shape[1:]
    at_Q1, key_L = torch.arange(length - count, length)[:, None], torch.arange(length)
    hidden_QL = key_L > at_Q1
    if rules.window is not None:
        hidden_QL |= key_L <= at_Q1 - rules.window
    scores_NQL = scores_NQL.masked_fill(hidden_QL.to(scores_NQL.device), float("-inf"))
    if rules.sinks is not None:
        sinks_NQ1 = rules.sinks[:, None, None].expand(-1, count, 1)
        scores_NQL = torch.cat([scores_NQL, sinks_NQ1], -1)
    weights_NQL = scores_NQL.softmax(-1)[..., :length]
    return (weights_NQL @ value_NLD).transpose(0, 1)
