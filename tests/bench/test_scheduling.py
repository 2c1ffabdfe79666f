"""What a sequence takes in the engine: memory, which is the same on every machine."""

from __future__ import annotations

from tests.bench.scheduling import Engine, fill, traced


def test_a_running_sequence_takes_less_than_2_kb() -> None:
    engine = Engine(4, 512)
    assert traced(lambda: fill(engine, 512)) / 512 < 2000
