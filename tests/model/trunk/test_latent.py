"""Attention over cached latents equals attention over the keys and values that they make, absorbed and expanded."""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_moe.model.native import library
from elastic_moe.model.trunk import latent as latents
from elastic_moe.model.trunk.attention import LATENTS, Window, paged_attention
from elastic_moe.model.trunk.attention_path import MATMUL, AttentionPath, KVShape
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.latent import LatentAttention
from elastic_moe.model.trunk.step_batch import SequenceSlice, StepBatch, step_context

CPU = torch.device("cpu")
HEADS, MADE, VALUE, LATENT, ROTATED = 5, 24, 16, 32, 8
LENGTHS = (300, 1, 20, 90)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(dtype: torch.dtype) -> LatentAttention:
    up = draw(0, HEADS, MADE + VALUE, LATENT) / LATENT**0.5
    return LatentAttention(up_NXR=up.to(dtype), key_size=MADE, rotated_size=ROTATED)


def cache_of(attention: LatentAttention, path: AttentionPath, dtype: torch.dtype) -> KVCache:
    cache = KVCache({0: attention.shape}, num_blocks=80, block_size=16, dtype=dtype, device=CPU, path=path)
    for store in cache.stores(0):  # what other sequences left must not matter
        store.fill_(math.nan)
    return cache


def run(cache: KVCache, attention: LatentAttention, parts: list[tuple[int, int, int]], **rules: Any) -> list[Tensor]:
    """Tokens start .. end - 1 of each text in one step: [tokens, heads, V] of each."""
    pieces = [
        SequenceSlice(token_ids=[0] * (end - start), start=start, block_ids=range(20 * n, 20 * n + 20), prompt_length=1)
        for n, start, end in parts
    ]
    query, latent, rotated = (
        torch.cat([text(n)[i][..., start:end, :] for n, start, end in parts], -2).to(attention.up_NXR.dtype)
        for i in range(3)
    )
    module: Any = SimpleNamespace(layer_idx=0, **{LATENTS: attention})
    window = Window(rules.pop("window", None))
    with step_context(StepBatch.build(pieces, cache, CPU)):
        out, _ = paged_attention(module, query[None], latent[None, None], rotated[None, None], window, **rules)
    return list(out[0].split([end - start for _, start, end in parts]))


def text(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, latents and rotated parts of a text."""
    tokens = LENGTHS[n]
    return draw(n, HEADS, tokens, MADE + ROTATED), draw(n + 10, tokens, LATENT), draw(n + 20, tokens, ROTATED)


def formula(attention: LatentAttention, n: int, window: int | None = None) -> Tensor:
    """[T, heads, V] in float64, over keys and values that are made first."""
    dtype = attention.up_NXR.dtype
    query, latent, rotated = (part.to(dtype).double() for part in text(n))
    made = torch.einsum("nxr,tr->ntx", attention.up_NXR.double(), latent)
    key = torch.cat((made[..., :MADE], rotated.expand(HEADS, -1, -1)), -1)
    scores = query @ key.transpose(1, 2) * (MADE + ROTATED) ** -0.5
    row, column = torch.arange(LENGTHS[n])[:, None], torch.arange(LENGTHS[n])
    hidden = (column > row) | (column <= row - (window or LENGTHS[n]))
    return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ made[..., MADE:]).transpose(0, 1)


STEPS: list[list[tuple[int, int, int]]] = [
    # whole, absorbed and expanded beside one another; then a part and single tokens; then tokens alone
    [(0, 0, 250), (1, 0, 1), (2, 0, 20)],
    [(0, 250, 299), (3, 0, 89)],
    [(0, 299, 300), (3, 89, 90)],
]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("budget", [1, 64 << 20], ids=["one head at a time", "all heads"])
def test_by_matrix_products(window: int | None, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "_EXPANDED_BYTES", budget)
    attention = layer(torch.float32)
    assert attention.fewest_expanded == 1 + 40 * 32 // (64 - 40)
    check(attention, MATMUL, window, tolerance=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_by_the_native_library(lib: ctypes.CDLL, window: int | None) -> None:
    check(layer(torch.bfloat16), AttentionPath(lib=library()), window, tolerance=2**-6)


def check(attention: LatentAttention, path: AttentionPath, window: int | None, *, tolerance: float) -> None:
    cache = cache_of(attention, path, attention.up_NXR.dtype)
    for step in STEPS:
        for (n, start, end), got in zip(step, run(cache, attention, step, window=window), strict=True):
            want = formula(attention, n, window)[start:end]
            assert ((got.double() - want).abs() <= tolerance * (want.abs() + 1)).all(), (n, start, end)


def test_a_token_takes_its_latent_and_its_rotated_part() -> None:
    shape = layer(torch.float32).shape
    assert shape == KVShape(num_heads=1, key_size=40, value_size=32, latent=True)
    assert shape.elements == LATENT + ROTATED
    cache = KVCache({0: shape}, num_blocks=10, block_size=16, dtype=torch.bfloat16, device=CPU)
    assert cache.nbytes == 10 * KVCache.block_bytes({0: shape}, block_size=16, dtype=torch.bfloat16) == 10 * 16 * 40 * 2


def test_expanding_never_pays_where_latents_are_small() -> None:
    attention = LatentAttention(up_NXR=draw(0, 2, 64, 16), key_size=32, rotated_size=8)
    assert attention.fewest_expanded > 1 << 60
