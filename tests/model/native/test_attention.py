"""Native attention equals the formula. Its bits do not depend on how a prompt is cut or what runs beside it."""

from __future__ import annotations

import ctypes
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_moe.model.native import library
from elastic_moe.model.native.attention import refusal
from elastic_moe.model.trunk.attention import Window, paged_attention
from elastic_moe.model.trunk.attention_path import AttentionPath
from elastic_moe.model.trunk.kv_cache import KVCache, KVShape
from elastic_moe.model.trunk.step_batch import SequenceSlice, StepBatch, step_context

CPU = torch.device("cpu")
LAYER: Any = SimpleNamespace(layer_idx=0)
BLOCKS = 64
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


class Text:
    """q, k and v of one sequence, and its blocks."""

    def __init__(self, seed: int, length: int, shape: KVShape, members: int, blocks: list[int]) -> None:
        heads = shape.num_heads * members
        self.q = draw(seed, heads, length, shape.key_size, scale=2.0)
        self.k = draw(seed + 1, shape.num_heads, length, shape.key_size)
        self.v = draw(seed + 2, shape.num_heads, length, shape.value_size)
        self.blocks = blocks


def make_cache(shape: KVShape, block_size: int) -> KVCache:
    path = AttentionPath(lib=library())
    cache = KVCache({0: shape}, num_blocks=BLOCKS, block_size=block_size, dtype=torch.bfloat16, device=CPU, path=path)
    # values that other sequences left in the cache must not matter
    for store in cache.stores(0):
        store.fill_(math.nan)
    return cache


def run(cache: KVCache, parts: list[tuple[Text, int, int]], **rules: Any) -> list[Tensor]:
    """Attention of tokens start..end of each text in one step: [tokens, heads, size] of each."""
    slices = [
        SequenceSlice(token_ids=[0] * (end - start), start=start, block_ids=text.blocks, prompt_length=1)
        for text, start, end in parts
    ]
    q, k, v = (
        # as transformers hands them: heads and tokens transposed
        torch.cat([getattr(text, name)[:, a:b] for text, a, b in parts], 1).transpose(0, 1).contiguous().transpose(0, 1)
        for name in "qkv"
    )
    window = Window(rules.pop("window", None))
    with step_context(StepBatch.build(slices, cache, CPU)):
        out, _ = paged_attention(LAYER, q[None], k[None], v[None], window, **rules)
    return list(out[0].split([end - start for _, start, end in parts]))


def formula(
    text: Text, *, window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None
) -> Tensor:
    """[T, heads, size] in float64."""
    heads, length, size = text.q.shape
    members = heads // len(text.k)
    k, v = (t.double().repeat_interleave(members, 0) for t in (text.k, text.v))
    scores = text.q.double() @ k.transpose(1, 2) / math.sqrt(size)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    row, key = torch.arange(length)[:, None], torch.arange(length)
    hidden = (key > row) | (key <= row - (window or length))
    scores = scores.masked_fill(hidden, -math.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.double()[:, None, None].expand(heads, length, 1)], -1)
    return (scores.softmax(-1)[..., :length] @ v).transpose(0, 1)


def near(got: Tensor, expected: Tensor) -> bool:
    # weights are rounded to bfloat16 (half of 2^-8 of each) and so is the result; values are some units large
    return bool(((got.double() - expected).abs() <= 2**-7 * (expected.abs() + 1)).all())


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sink", [False, True])
def test_attention_is_the_formula(
    lib: ctypes.CDLL, block_size: int, window: int | None, softcap: float | None, sink: bool
) -> None:
    shape = KVShape(num_heads=2, key_size=24, value_size=16)
    cache = make_cache(shape, block_size)
    # more keys than a chunk, more rows than a tile of them
    text = Text(1, 560, shape, 3, torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1)).tolist())
    rules = {"window": window, "softcap": softcap, "s_aux": draw(9, 6, scale=3.0) if sink else None}
    expected = formula(text, **rules)  # type: ignore[arg-type]
    for start, end in ((0, 300), (300, 559), (559, 560)):
        [got] = run(cache, [(text, start, end)], **rules)
        assert near(got, expected[start:end])


@given(
    length=st.integers(1, 400),
    heads=st.integers(1, 4),
    members=st.integers(1, 9),
    key_size=st.integers(1, 70).map(lambda half: 2 * half),
    value_size=st.integers(1, 9).map(lambda part: 16 * part),
    window=st.none() | st.integers(1, 400),
    data=st.data(),
)
@quick
def test_cuts_company_and_threads_change_no_bit(
    lib: ctypes.CDLL,
    length: int,
    heads: int,
    members: int,
    key_size: int,
    value_size: int,
    window: int | None,
    data: st.DataObject,
) -> None:
    shape = KVShape(num_heads=heads, key_size=key_size, value_size=value_size)
    text = Text(1, length, shape, members, list(range(30)))
    [whole] = run(make_cache(shape, 16), [(text, 0, length)], window=window)
    assert near(whole, formula(text, window=window))
    other = Text(7, 70, shape, members, list(range(30, 60)))
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=4))})
    cache = make_cache(shape, 16)
    pieces = []
    with pytest.MonkeyPatch.context() as patch:
        for at, (start, end) in enumerate(itertools.pairwise(cuts)):
            patch.setattr(torch, "get_num_threads", lambda at=at: 1 + at)
            pieces.append(run(cache, [(other, at, at + 1), (text, start, end), (text, start, end)], window=window)[1])
    assert torch.equal(torch.cat(pieces), whole)


def test_broken_numbers_show(lib: ctypes.CDLL) -> None:
    shape = KVShape(num_heads=1, key_size=16, value_size=16)
    text = Text(1, 20, shape, 1, [0, 1])
    text.k[0, 7] = math.nan
    [out] = run(make_cache(shape, 16), [(text, 0, 20)])
    assert out[:7].isfinite().all()
    assert out[7:].isnan().all()


def test_which_caches_fit() -> None:
    fits = {"block_size": 16, "key_size": 6, "value_size": 32}
    assert refusal(**fits) is None
    for name, value in {"block_size": 8, "key_size": 7, "value_size": 24}.items():
        why = refusal(**(fits | {name: value}))
        assert why is not None
        assert str(value) in why
