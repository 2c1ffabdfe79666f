"""Layers with a window read the blocks of their window alone, with the same results as if all blocks were there."""

from __future__ import annotations

import ctypes
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from elastic_moe.cluster.messages.seats import LiveBlocks
from elastic_moe.cluster.messages.steps import WindowBlocks
from elastic_moe.model.trunk.attention import Window, paged_attention
from elastic_moe.model.trunk.attention_path import MATMUL, AttentionPath, KVShape, VarlenVariant
from elastic_moe.model.trunk.flash import try_variants
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.step_batch import SequenceSlice, StepBatch, step_context
from elastic_moe.model.trunk.windows import WindowGroup, window_group
from tests.model.kernels import KERNELS

CPU = torch.device("cpu")
HEADS, LENGTH, WINDOW = 4, 700, 40
FULL = KVShape(num_heads=2, key_size=16, value_size=16)
SHORT = KVShape(num_heads=1, key_size=32, value_size=16, window=WINDOW)
SHAPES = {0: FULL, 1: SHORT}


def layer(number: int) -> Any:
    return SimpleNamespace(layer_idx=number)


def test_which_layers_form_a_group() -> None:
    shapes = {0: FULL, 1: SHORT, 2: KVShape(num_heads=1, key_size=8, value_size=8, window=90)}
    assert window_group(shapes, max_model_len=100) == WindowGroup(layers=frozenset({1, 2}), tokens=90)
    assert window_group(shapes, max_model_len=90) == WindowGroup(layers=frozenset({1}), tokens=40)
    assert window_group(shapes, max_model_len=40) is None, "no sequence is longer than the window"


@pytest.mark.parametrize("block_size", [4, 16, 48])
def test_a_sequence_begins_shortly_before_its_window(block_size: int) -> None:
    group = WindowGroup(layers=frozenset({0}), tokens=WINDOW)
    table = [1000 + n for n in range(300)]
    for start, count in itertools.product([0, 1, 39, 40, 41, 255, 256, 300, 301, 777], [1, 100]):
        end = start + count
        first = group.first_block(start, block_size)
        got_start, got_end, got = group.seen(start, end, first, table[first:], block_size)
        moved = start - got_start
        assert (got_end - got_start, moved % 256, moved % block_size) == (count, 0, 0)
        assert len(got) == -(-got_end // block_size)
        for position in range(max(0, start - WINDOW + 1), end):
            assert got[(position - moved) // block_size] == table[position // block_size]
        assert set(got) <= set(table[first:]), "a block that is not the sequence's own is read"


def path_of(name: str, request: pytest.FixtureRequest) -> AttentionPath:
    if name == "native":
        lib: ctypes.CDLL = request.getfixturevalue("lib")
        return AttentionPath(lib=lib)
    if name == "matmul":
        return MATMUL
    request.getfixturevalue("monkeypatch").setattr(varlen, "varlen_attn", KERNELS[name])
    variant = try_variants(SHAPES.values(), dtype=torch.float32, device=CPU, block_size=16)
    assert isinstance(variant, VarlenVariant)
    return AttentionPath(varlen=variant)


@pytest.mark.parametrize("name", ["matmul", "native", *KERNELS])
def test_results_are_those_with_all_blocks(name: str, request: pytest.FixtureRequest) -> None:
    """Same bits in bfloat16 by the native library. What the sequence does not hold is not a number."""
    path, native = path_of(name, request), name == "native"
    dtype = torch.bfloat16 if native else torch.float32
    g = torch.Generator().manual_seed(3)
    texts = {
        number: tuple(
            torch.randn(heads, LENGTH, size, generator=g).to(dtype)
            for heads, size in ((HEADS, s.key_size), (s.num_heads, s.key_size), (s.num_heads, s.value_size))
        )
        for number, s in SHAPES.items()
    }
    group = window_group(SHAPES, max_model_len=LENGTH)
    assert group is not None
    made = {"num_blocks": 44, "block_size": 16, "dtype": dtype, "device": CPU, "path": path}
    whole, kept = KVCache(SHAPES, **made), KVCache(SHAPES, **made, windows=group, num_window_blocks=30)  # type: ignore[arg-type]
    assert kept.stores(1)[0].nbytes < whole.stores(1)[0].nbytes
    free, live = list(range(30)), LiveBlocks()
    for start, end in itertools.pairwise((0, 300, 301, 302, 500, 600, *range(601, 640), 700)):
        gone = live.ids.copy()
        live.drop_before(group.first_block(start, 16))
        free += gone[: len(gone) - len(live.ids)]
        last = live.first + len(live.ids)
        live.put(WindowBlocks(first=last, ids=tuple(free.pop(0) for _ in range(-(-end // 16) - last))))
        for store in kept.stores(1):
            # this layer has one head, so its blocks lie alike in all layouts
            store.view(30, -1)[free] = math.nan
        outs = []
        for cache, blocks in ((whole, None), (kept, live)):
            piece = SequenceSlice(
                token_ids=[0] * (end - start), start=start, block_ids=range(44), windows=blocks, prompt_length=1
            )
            with step_context(StepBatch.build([piece], cache, CPU)):
                for number, window in ((0, None), (1, WINDOW)):
                    q, k, v = (part[None, :, start:end] for part in texts[number])
                    outs.append(paged_attention(layer(number), q, k, v, Window(window))[0])
        assert torch.equal(outs[0], outs[2])
        if native:
            assert torch.equal(outs[1], outs[3])
        else:
            torch.testing.assert_close(outs[1], outs[3], rtol=1e-5, atol=1e-5)
