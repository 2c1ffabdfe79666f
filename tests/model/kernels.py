"""torch's variable-length FlashAttention as its versions have it, in plain arithmetic on any device and dtype.

Only the interface is imitated: what a kernel takes, what it refuses, and in which shape it answers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[T, N, D] and sums [N, T] of one sequence's last T tokens; the last of them sees all keys."""
    members = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(members, 1).transpose(0, 1) for t in (k, v))
    scores = q.transpose(0, 1).float() @ k.float().transpose(1, 2) * scale
    at, key = torch.arange(k.shape[1] - len(q), k.shape[1])[:, None], torch.arange(k.shape[1])
    hidden = key > at + window[1]
    if window[0] >= 0:
        hidden |= key < at - window[0]
    scores = scores.masked_fill(hidden.to(q.device), float("-inf"))
    return (scores.softmax(-1) @ v.float()).transpose(0, 1).to(q.dtype), scores.logsumexp(-1)


def _run(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, max_q: int, max_k: int, lengths: list[int], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    assert cu_q.dtype == torch.int32
    begins = cu_q.tolist()
    assert max_q == max(b - a for a, b in pairwise(begins))
    assert max_k == max(lengths)
    table, at, outs, sums = options.get("block_table"), 0, [], []
    for n, length in enumerate(lengths):
        if table is None:
            keys, values = k[at : at + length], v[at : at + length]
            at += length
        else:
            assert table.dtype == torch.int32
            keys, values = (cache[table[n].long()].flatten(0, 1)[:length] for cache in (k, v))
        rows = slice(begins[n], begins[n + 1])
        out, total = _attend(q[rows], keys, values, options["scale"], options["window_size"])
        outs.append(out)
        sums.append(total)
    return torch.cat(outs), torch.cat(sums, 1)


def plain(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Any:  # fmt: skip
    """No pages, one head size, sums as the documentation has them."""
    if key.shape[2] != value.shape[2]:
        raise RuntimeError("value has another head size")
    out, sums = _run(query, key, value, cu_seq_q, max_q, max_k, cu_seq_k.diff().tolist(),
                     {"scale": scale, "window_size": window_size})  # fmt: skip
    return out, sums.T


def large_pages(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
) -> Any:  # fmt: skip
    """Takes pages of a multiple of 256 tokens, and needs the begins of keys also with pages."""
    if not enable_gqa and query.shape[1] != key.shape[-2]:
        raise ValueError("Try setting enable_gqa=True for GQA.")
    if key.shape[-1] != value.shape[-1]:
        raise RuntimeError("value has another head size")
    if cu_seq_k is None or (block_table is not None and key.shape[1] % 256):
        raise RuntimeError("Paged KV cache block size must be divisible by 256")
    lengths = cu_seq_k.diff() if seqused_k is None else seqused_k
    options = {"scale": scale, "window_size": window_size, "block_table": block_table}
    return _run(query, key, value, cu_seq_q, max_q, max_k, lengths.tolist(), options)


def any_pages(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
) -> Any:  # fmt: skip
    """Takes pages of any size without the begins of keys, and values of another size than keys."""
    if block_table is not None and cu_seq_k is not None:
        raise RuntimeError("If cu_seqlens_k is passed in, then page table is not supported")
    lengths = cu_seq_k.diff() if cu_seq_k is not None else seqused_k
    assert lengths is not None
    options = {"scale": scale, "window_size": window_size, "block_table": block_table}
    return _run(query, key, value, cu_seq_q, max_q, max_k, lengths.tolist(), options)


def wrong_corner(*args: Any, **options: Any) -> Any:
    """Causal from the upper left corner, as other attention functions have it."""
    left, right = options["window_size"]
    q_begins, k_begins = args[3], args[4]
    if k_begins is None:
        raise RuntimeError("no pages")
    shift = int((k_begins.diff() - q_begins.diff()).max())
    return plain(*args, **options | {"window_size": (left, right - shift)})


KERNELS: dict[str, Callable[..., Any]] = {"plain": plain, "large pages": large_pages, "any pages": any_pages}
