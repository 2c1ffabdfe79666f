"""Paged attention equals the formula, with windows, sinks and soft-caps, for prompts in chunks beside single tokens."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elastic_moe.model.trunk.attention import Window, describe_mask, paged_attention
from elastic_moe.model.trunk.kv_cache import KVCache, KVShape
from elastic_moe.model.trunk.step_batch import SequenceSlice, StepBatch, step_context

HEADS, KV_HEADS, SIZE, VALUE_SIZE, BLOCK = 4, 2, 8, 6, 4
CPU = torch.device("cpu")
LAYER: Any = SimpleNamespace(layer_idx=3)


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, softcap: float | None, sinks: Any
) -> torch.Tensor:
    """[T, heads, size] of one whole sequence, token by token, in float64."""
    rows = []
    for t, h in itertools.product(range(q.shape[1]), range(HEADS)):
        low = 0 if window is None else max(0, t - window + 1)
        g = h // (HEADS // KV_HEADS)
        scores = (k[g, low : t + 1].double() @ q[h, t].double()) / math.sqrt(SIZE)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        total = weights.sum() + (0 if sinks is None else sinks[h].double().exp())
        rows.append((weights / total) @ v[g, low : t + 1].double())
    return torch.stack(rows).view(q.shape[1], HEADS, VALUE_SIZE).float()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sink", [False, True])
def test_attention_is_the_formula(window: int | None, softcap: float | None, sink: bool) -> None:
    g = torch.Generator().manual_seed(1)
    # longer than a tile, so that a prompt is computed in several
    lengths = [150, 9, 2]
    texts = [
        (
            torch.randn(HEADS, n, SIZE, generator=g) * 2,
            torch.randn(KV_HEADS, n, SIZE, generator=g),
            torch.randn(KV_HEADS, n, VALUE_SIZE, generator=g),
        )
        for n in lengths
    ]
    sinks = torch.randn(HEADS, generator=g) if sink else None
    shape = KVShape(num_heads=KV_HEADS, key_size=SIZE, value_size=VALUE_SIZE)
    cache = KVCache({3: shape}, num_blocks=64, block_size=BLOCK, dtype=torch.float32, device=CPU)
    order = torch.randperm(64, generator=g).tolist()
    first = [0, 38, 41]
    tables = [order[at : at + -(-n // BLOCK)] for at, n in zip(first, lengths, strict=True)]
    got: list[list[torch.Tensor]] = [[] for _ in lengths]
    # all but the last four tokens at once, then one by one beside one another
    cuts = [[0, max(1, n - 4), *range(max(1, n - 4) + 1, n + 1)] for n in lengths]
    for step in range(max(len(cut) for cut in cuts) - 1):
        parts = [(i, cut[step], cut[step + 1]) for i, cut in enumerate(cuts) if step + 1 < len(cut)]
        slices = [
            SequenceSlice(token_ids=[0] * (end - start), start=start, block_ids=tables[i], prompt_length=1)
            for i, start, end in parts
        ]
        q, k, v = (torch.cat([texts[i][part][:, a:b] for i, a, b in parts], 1)[None] for part in range(3))
        with step_context(StepBatch.build(slices, cache, CPU)):
            out, _ = paged_attention(LAYER, q, k, v, Window(window), softcap=softcap, s_aux=sinks)
        for (i, *_), piece in zip(parts, out[0].split([b - a for _, a, b in parts]), strict=True):
            got[i].append(piece)
    for (q, k, v), pieces in zip(texts, got, strict=True):
        torch.testing.assert_close(torch.cat(pieces), naive(q, k, v, window, softcap, sinks), rtol=1e-4, atol=1e-5)


def test_a_mask_of_the_models_own_is_refused() -> None:
    assert describe_mask(local_size=7) == Window(7)
    with pytest.raises(NotImplementedError, match="neither causal nor a sliding window"):
        describe_mask(use_vmap=True)
