"""Attention by FlashAttention's interface equals the formula with any version of it; a wrong version is not used."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from elastic_moe.model.trunk.attention import Window, paged_attention
from elastic_moe.model.trunk.attention_path import MATMUL, AttentionPath
from elastic_moe.model.trunk.flash import VarlenVariant, find_variant, try_variants
from elastic_moe.model.trunk.kv_cache import KVCache, KVShape
from elastic_moe.model.trunk.step_batch import SequenceSlice, StepBatch, step_context
from tests.model import kernels
from tests.model.kernels import KERNELS

CPU = torch.device("cpu")
LAYER: Any = SimpleNamespace(layer_idx=0)
SHAPE = KVShape(num_heads=2, key_size=8, value_size=6)


def find(block_size: int, shape: KVShape = SHAPE) -> VarlenVariant | str:
    return try_variants([shape], dtype=torch.float32, device=CPU, block_size=block_size)


EVEN = KVShape(num_heads=2, key_size=8, value_size=8)
GATHER = VarlenVariant(paged=False)


@pytest.mark.parametrize(
    ("kernel", "shape", "block_size", "variant"),
    [
        (kernels.plain, SHAPE, 4, VarlenVariant(paged=False, sums_by_token=True)),
        (kernels.large_pages, EVEN, 16, GATHER),
        (kernels.large_pages, EVEN, 256, VarlenVariant(paged=True)),
        # pages are read where they lie: there is no room for padding
        (kernels.large_pages, SHAPE, 256, GATHER),
        (kernels.any_pages, SHAPE, 16, VarlenVariant(paged=True, passes_begins=False)),
        (kernels.wrong_corner, EVEN, 16, "no way of calling torch's FlashAttention gave right results on this device"),
    ],
)
def test_the_variant_is_found_by_trying(
    kernel: Callable[..., Any],
    shape: KVShape,
    block_size: int,
    variant: VarlenVariant | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    assert find(block_size, shape) == variant


def test_no_kernel_for_bounded_scores_or_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", kernels.any_pages)
    bounded = KVShape(num_heads=2, key_size=8, value_size=8, softcap=True)
    assert find(16, bounded) == "FlashAttention does not bound scores, as this model does"
    assert find_variant([EVEN], dtype=torch.bfloat16, device=CPU, block_size=16) == "FlashAttention is for CUDA GPUs"
    monkeypatch.undo()
    # torch's own has none for CPUs
    assert isinstance(find(16), str)


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("block_size", [4, 256])
@pytest.mark.parametrize(("window", "sink"), [(None, False), (1, False), (5, False), (None, True), (5, True)])
def test_every_variant_equals_plain_attention(
    kernel: str, block_size: int, window: int | None, sink: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", KERNELS[kernel])
    variant = find(block_size)
    assert isinstance(variant, VarlenVariant)
    g = torch.Generator().manual_seed(1)
    lengths = [30, 9, 2]
    texts = [[torch.randn(heads, n, size, generator=g) for heads, size in ((4, 8), (2, 8), (2, 6))] for n in lengths]
    sinks = torch.randn(4, generator=g) if sink else None
    order = torch.randperm(24, generator=g).tolist()
    tables = [order[8 * i : 8 * i + -(-n // block_size)] for i, n in enumerate(lengths)]
    caches = [
        KVCache({0: SHAPE}, num_blocks=24, block_size=block_size, dtype=torch.float32, device=CPU, path=path)
        for path in (AttentionPath(varlen=variant), MATMUL)
    ]
    # a prompt in two chunks and then token by token, beside others that do something else
    cuts = [[0, 11, n - 2, n - 1, n] if n > 20 else [0, n - 1, n] for n in lengths]
    for step in range(4):
        parts = [(i, cut[step], cut[step + 1]) for i, cut in enumerate(cuts) if step + 1 < len(cut)]
        slices = [
            SequenceSlice(token_ids=[0] * (end - start), start=start, block_ids=tables[i], prompt_length=1)
            for i, start, end in parts
        ]
        q, k, v = (torch.cat([texts[i][part][:, a:b] for i, a, b in parts], 1)[None] for part in range(3))
        got, want = (attend(cache, slices, q, k, v, window, sinks) for cache in caches)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def attend(
    cache: KVCache, slices: list[SequenceSlice], q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Any
) -> Tensor:
    with step_context(StepBatch.build(slices, cache, CPU)):
        out, _ = paged_attention(LAYER, q, k, v, Window(window), s_aux=sinks)
    return out


def test_what_others_left_in_a_block_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel, block_size in itertools.product(KERNELS.values(), (4, 256)):
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        variant = find(block_size)
        assert isinstance(variant, VarlenVariant)
        cache = KVCache(
            {0: SHAPE},
            num_blocks=2,
            block_size=block_size,
            dtype=torch.float32,
            device=CPU,
            path=AttentionPath(varlen=variant),
        )
        for store in cache.stores(0):
            store.fill_(torch.nan)
        piece = SequenceSlice(token_ids=[0] * 3, start=0, block_ids=[1], prompt_length=1)
        out = attend(cache, [piece], torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 6), None, None)
        assert torch.equal(out, torch.ones(1, 3, 4, 6))
