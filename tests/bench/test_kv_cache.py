"""The table of KV bytes: what layers with latents and with windows take of a given room."""

from __future__ import annotations

import pytest

from elastic_moe.model.checkpoints.servability import LayerKV
from tests.bench import kv_cache


def layer(numbers: int, window: int | None = None) -> LayerKV:
    return LayerKV(numbers=numbers, expanded=4 * numbers, window=window)


def test_the_longest_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "ROOM_BYTES", 1_000_000)
    monkeypatch.setattr(kv_cache, "STEP_TOKENS", 50)
    both = [layer(10), layer(40)]
    assert kv_cache.longest_here(both) == kv_cache.longest_by_vllm(both) == 10_000
    # the second keeps 9 + 50 tokens of 80 bytes, and the first has the rest
    both = [layer(10), layer(40, window=10)]
    assert kv_cache.longest_by_vllm(both) == (1_000_000 - 59 * 80) // 20
    # here it keeps 10 tokens, those of two steps on either side of them and the block begun: 3 blocks; and two chunks
    # of 50 tokens: 7 blocks
    assert kv_cache.longest_here(both) == (1_000_000 - 10 * 16 * 80) // 20 // 16 * 16
    assert kv_cache.longest_here([layer(10, window=10)]) == 0, "windows alone take as much at any length"
    # a room so small that no window is full
    monkeypatch.setattr(kv_cache, "ROOM_BYTES", 100)
    both = [layer(1), layer(1, window=30)]
    assert (kv_cache.longest_here(both), kv_cache.longest_by_vllm(both)) == (16, 25)


def test_states_take_the_same_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times here, since two steps may be in flight, and once in vLLM."""
    monkeypatch.setattr(kv_cache, "ROOM_BYTES", 1_000_000)
    layers = [layer(50)]
    assert kv_cache.longest_here(layers, 100_000) == (1_000_000 - 3 * 100_000) // 100 // 16 * 16
    assert kv_cache.longest_by_vllm(layers, 100_000) == (1_000_000 - 100_000) // 100
    assert kv_cache.row("some", layers, 100_000)[5] == "0.1"


def test_a_row_says_what_latents_save() -> None:
    cells = kv_cache.row("some", [layer(100), layer(100, window=64)])
    assert cells[:5] == ["some", "2, 1 with a window of 64", "0.4", "4.0", "50%"]
