"""The migrator over workers that only pretend: what it copies, how fast, and when it stops."""

from __future__ import annotations

import asyncio
import itertools
import time
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_moe.actors.coordinator import migrator as migrator_module
from elastic_moe.actors.coordinator.migrator import MigrationReport, Migrator
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.facts.transfers import AT_ONCE_ON_GPUS, BUNDLE_BYTES
from elastic_moe.cluster.placement import Move, WorkerId
from tests.actors.fakes import Handle

BYTES = 1000


class PlainWorker:
    def __init__(self) -> None:
        self.imported: list[object] = []

    def export_experts(self, pairs: list[tuple[int, int]], target: WorkerId) -> list[tuple[int, int]]:
        assert target[0] == "t", "they are for the worker that gets them"
        return pairs

    def import_experts(self, copies: list[object]) -> None:
        self.imported += copies


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

        async def import_experts(self, copies: list[object]) -> None:
            self.busy += 1
            running.append(self.busy)
            await asyncio.sleep(0.05)
            self.busy -= 1

    there = {WorkerId(f"{side}0"): Remote(Handle(Slow())) for side in "st"}
    migrator = Migrator(BUNDLE_BYTES, on_gpus=True)
    assert asyncio.run(migrator.copy(moves(3 * AT_ONCE_ON_GPUS), there)).seconds < 0.3
    assert max(running) == AT_ONCE_ON_GPUS
    assert len(running) == 3 * AT_ONCE_ON_GPUS
    running.clear()
    asyncio.run(Migrator(BUNDLE_BYTES + 1, on_gpus=True).copy(moves(3), there))
    assert running == [1, 1, 1], "larger ones go one by one"


def test_workers_on_gpus_send_bundles() -> None:
    """A limit of bandwidth counts every expert of a bundle; one that fails is named, and nothing is begun after it."""
    calls: list[int] = []

    class Bundled(PlainWorker):
        def import_experts(self, copies: list[Any]) -> None:
            calls.append(len(copies))
            if (0, 7) in copies:
                raise PlacementError("expert 7 of layer 0 arrived damaged")
            super().import_experts(copies)

    there = {WorkerId(f"{side}0"): Remote[Any](Handle(Bundled())) for side in "st"}
    migrator = Migrator(BUNDLE_BYTES // 3, bytes_per_s=60 * (BUNDLE_BYTES // 3), on_gpus=True)
    report = asyncio.run(migrator.copy(moves(7), there))
    assert (len(report.done), report.error) == (7, None)
    assert calls == [3, 3, 1]
    assert report.seconds >= 0.1
    report = asyncio.run(migrator.copy(moves(9), there, True))
    assert report.error == "layer 0 expert 6 and 2 others from s0 to t0: expert 7 of layer 0 arrived damaged"
    assert len(report.done) < 9


def test_all_copies_together_keep_to_the_bandwidth() -> None:
    """Ten experts on two pairs at 50 experts a second: the tenth begins after 0.18 s."""
    migrator = Migrator(BYTES, bytes_per_s=50 * BYTES)
    report = asyncio.run(migrator.copy(moves(10, pairs=2), workers(2)))
    assert len(report.done) == 10
    assert 0.18 <= report.seconds < 2.0


def test_workers_rest_between_copies_while_requests_run() -> None:
    """Three copies of 50 ms each, and as long a rest after each; none where it is urgent."""

    class Slow(PlainWorker):
        def import_experts(self, copies: list[object]) -> None:
            time.sleep(0.05)
            super().import_experts(copies)

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
