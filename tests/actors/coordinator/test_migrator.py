"""The migrator over workers that only pretend: what it copies, how fast, and when it stops."""

from __future__ import annotations

import asyncio
import itertools
import time
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_moe.actors.coordinator import migrator as migrator_module
from elastic_moe.actors.coordinator.migrator import AT_ONCE_ON_GPUS, MigrationReport, Migrator
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.placement import Move, WorkerId
from tests.actors.fakes import Handle

BYTES = 1000


class PlainWorker:
    def __init__(self) -> None:
        self.imported: list[object] = []

    def export_expert(self, layer: int, expert: int, target: WorkerId) -> tuple[int, int]:
        assert target[0] == "t", "it is for the worker that gets it"
        return layer, expert

    def import_expert(self, copy: object) -> None:
        self.imported.append(copy)


def moves(count: int, *, pairs: int = 1) -> list[Move]:
    """`pairs` disjoint pairs of workers, `count` experts in all."""
    return [
        Move(layer=0, expert=n, source=WorkerId(f"s{n % pairs}"), target=WorkerId(f"t{n % pairs}"))
        for n in range(count)
    ]


def workers(pairs: int = 1) -> dict[WorkerId, Remote[Any]]:
    return {WorkerId(f"{side}{pair}"): Remote(Handle(PlainWorker())) for side in "st" for pair in range(pairs)}


def test_every_expert_arrives_once() -> None:
    there = workers(2)
    report = asyncio.run(Migrator(BYTES).copy(moves(9, pairs=2), there))
    assert (len(report.done), report.nbytes, report.error) == (9, 9 * BYTES, None)
    arrived = [copy for actor in there.values() for copy in actor.handle.target.imported]
    assert sorted(arrived) == [(0, n) for n in range(9)]


def test_workers_on_gpus_take_some_at_a_time_and_do_not_rest() -> None:
    running: list[int] = []

    class Slow(PlainWorker):
        busy = 0

        async def import_expert(self, copy: object) -> None:
            self.busy += 1
            running.append(self.busy)
            await asyncio.sleep(0.05)
            self.busy -= 1

    there = {WorkerId(f"{side}0"): Remote(Handle(Slow())) for side in "st"}
    assert asyncio.run(Migrator(BYTES, on_gpus=True).copy(moves(3 * AT_ONCE_ON_GPUS), there)).seconds < 0.3
    assert max(running) == AT_ONCE_ON_GPUS


def test_all_copies_together_keep_to_the_bandwidth() -> None:
    """Ten experts on two pairs at 50 experts a second: the tenth begins after 0.18 s."""
    migrator = Migrator(BYTES, bytes_per_s=50 * BYTES)
    report = asyncio.run(migrator.copy(moves(10, pairs=2), workers(2)))
    assert len(report.done) == 10
    assert 0.18 <= report.seconds < 2.0


def test_workers_rest_between_copies_while_requests_run() -> None:
    """Three copies of 50 ms each, and as long a rest after each; none where it is urgent."""

    class Slow(PlainWorker):
        def import_expert(self, copy: object) -> None:
            time.sleep(0.05)
            super().import_expert(copy)

    there = {WorkerId("s0"): Remote[Any](Handle(PlainWorker())), WorkerId("t0"): Remote[Any](Handle(Slow()))}
    assert asyncio.run(Migrator(BYTES).copy(moves(3), there)).seconds >= 0.3
    assert asyncio.run(Migrator(BYTES).copy(moves(3), there, True)).seconds < 0.3


def test_a_pause_may_end_between_two_reads_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock moves on between any two looks at it, and so past the end of the pause."""
    looks = itertools.count()
    monkeypatch.setattr(migrator_module, "time", SimpleNamespace(monotonic=lambda: next(looks) * 0.01))
    for interval_s in (0.015, 0.025, 0.035):
        migrator = Migrator(BYTES, bytes_per_s=BYTES / interval_s)
        report = asyncio.run(asyncio.wait_for(migrator.copy(moves(5), workers()), 10))
        assert len(report.done) == 5


def test_urgent_copies_are_not_limited() -> None:
    migrator = Migrator(BYTES, bytes_per_s=BYTES)
    report = asyncio.run(migrator.copy(moves(10), workers(), True))
    assert len(report.done) == 10
    assert report.seconds < 1.0


def test_a_newer_call_does_not_wait_for_the_bandwidth_of_an_older_one() -> None:
    async def story() -> tuple[MigrationReport, MigrationReport]:
        migrator = Migrator(BYTES, bytes_per_s=BYTES)
        older = asyncio.ensure_future(migrator.copy(moves(10), workers()))
        await asyncio.sleep(0.05)
        newer = await migrator.copy(moves(3), workers(), True)
        return await older, newer

    begun = time.monotonic()
    older, newer = asyncio.run(story())
    assert (older.error, len(older.done)) == ("superseded", 1)
    assert len(newer.done) == 3
    assert time.monotonic() - begun < 1.0
