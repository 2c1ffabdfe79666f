"""What a sequence takes in the engine: memory, and work in each step, which are the same on every machine."""

from __future__ import annotations

from collections import Counter

import pytest

from elastic_moe.actors.caches.rows import RECENT_TOKENS
from elastic_moe.actors.caches.running_requests import RunningRequest
from tests.bench.scheduling import Engine, Times, fill, traced


def test_a_running_sequence_takes_less_than_2_kb() -> None:
    engine = Engine(4, 512)
    assert traced(lambda: fill(engine, 512)) / 512 < 2000


def test_sequences_that_began_together_fetch_their_tokens_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one step in 64 would take many times as long as the others."""
    fetched: Counter[int] = Counter()
    engine, fill_one = Engine(4, 256), RunningRequest.fill

    def fill_counted(request: RunningRequest, length: int, newest: list[int]) -> None:
        fetched[engine.steps] += 1
        fill_one(request, length, newest)

    fill(engine, 256)
    monkeypatch.setattr(RunningRequest, "fill", fill_counted)
    for _ in range(RECENT_TOKENS):
        engine.step(Times())
    assert fetched.total() == 256
    assert max(fetched.values()) < 32
