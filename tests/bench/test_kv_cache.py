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
    assert kv_cache.longest([layer(10), layer(40)]) == (10_000, 10_000)
    # the second keeps 9 + 50 tokens of 80 bytes, and the first has the rest
    assert kv_cache.longest([layer(10), layer(40, window=10)]) == (10_000, (1_000_000 - 59 * 80) // 20)
    # a room so small that no window is full
    monkeypatch.setattr(kv_cache, "ROOM_BYTES", 100)
    assert kv_cache.longest([layer(1), layer(1, window=10)]) == (25, 25)


def test_a_row_says_what_latents_save() -> None:
    cells = kv_cache.row("some", [layer(100), layer(100, window=64)])
    assert cells[:4] == ["some", "2, 1 with a window of 64", "0.4", "4.0"]
