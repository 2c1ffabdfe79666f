"""Workers' reports reach the coordinator as one for each node."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from elastic_moe.actors.coordinator import polling
from elastic_moe.actors.coordinator.control_loop import ControlLoop
from elastic_moe.cluster.errors import StepAborted
from elastic_moe.cluster.messages.epochs import WorkerInfo
from elastic_moe.cluster.placement import WorkerId
from tests.actors.coordinator.running import control_loop, ready, running, until
from tests.actors.fakes import LOAD, PlainFleet

WORKERS = 3


def test_what_workers_of_a_node_did_is_added_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "COUNTS_S", 0.05)
    calls: list[str] = []

    async def story() -> None:
        async with running(tmp_path, workers=WORKERS) as (coordinator, fleet):
            await ready(coordinator)
            loop = control_loop(coordinator)
            for name, worker in fleet.workers.items():

                async def count(method: str, name: str = name) -> None:
                    if method == "report":
                        calls.append(name)

                worker.before = count
            calls.clear()
            seen = loop.window.reports
            await reports(loop, seen + 3)
            # one report is taken for the calls of three workers
            assert abs(len(calls) / WORKERS - (loop.window.reports - seen)) <= 1
            assert loop.window.taken.sum() == loop.window.reports * WORKERS * LOAD.sum()
            assert set(loop.poller.resident) == set(fleet.workers) == set(loop.poller.link_gbps)
            await _one_fails(loop, fleet)

    async def reports(loop: ControlLoop, number: int) -> None:
        async def there() -> bool:
            return loop.window.reports >= number

        await until(there)

    async def _one_fails(loop: ControlLoop, fleet: PlainFleet) -> None:
        """Its node's report is lost, the worker is not, and the next report comes."""
        failed = 0

        async def fail(method: str) -> None:
            nonlocal failed
            if method == "report" and failed < 2:
                failed += 1
                raise StepAborted("not now")

        fleet.workers[WorkerId("w1")].before = fail

        async def has_failed() -> bool:
            return failed == 2

        await until(has_failed)
        await reports(loop, loop.window.reports + 1)
        assert loop.window.taken.sum() == loop.window.reports * WORKERS * LOAD.sum()
        infos = [record.info for record in loop.state.facts.loaded]
        assert all(isinstance(info, WorkerInfo) for info in infos)
        assert len(infos) == WORKERS

    asyncio.run(story())


def report_when_asked(monkeypatch: pytest.MonkeyPatch, *, poll_s: float) -> None:
    """Have workers report their counts only where somebody asks, who waits for so long."""
    monkeypatch.setattr(polling, "COUNTS_S", 3600.0)
    monkeypatch.setattr(polling, "COUNTS_PER_WINDOW", 1e-3)
    monkeypatch.setattr(polling.liveness, "POLL_S", poll_s)


def test_who_asks_for_a_placement_gets_one_for_all_that_was_done_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports come every five seconds otherwise, and a dry run behind a user's first requests said that nothing was
    counted."""
    report_when_asked(monkeypatch, poll_s=0.2)

    async def story() -> None:
        async with running(tmp_path, workers=2) as (coordinator, fleet):
            await ready(coordinator)
            loop = control_loop(coordinator)
            before = loop.window.reports
            await coordinator.preview("greedy")
            assert loop.window.reports == before + 1
            await coordinator.rebalance("greedy")
            assert loop.window.reports == before + 2

            async def hang(method: str) -> None:
                if method == "report":
                    await asyncio.Event().wait()

            fleet.workers[WorkerId("w1")].before = hang
            await asyncio.wait_for(coordinator.preview("greedy"), 5)

    asyncio.run(story())


def test_a_report_that_comes_too_late_for_who_asked_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers count anew from a report on, so what it tells would be lost: all of it, on a busy machine under `emoe
    top`, which asks each second."""
    report_when_asked(monkeypatch, poll_s=0.05)

    async def story() -> None:
        async with running(tmp_path, workers=1) as (coordinator, fleet):
            await ready(coordinator)
            loop = control_loop(coordinator)
            before, goes_on = loop.window.reports, asyncio.Event()

            async def wait(method: str) -> None:
                if method == "report":
                    await goes_on.wait()

            fleet.workers[WorkerId("w0")].before = wait
            for _ in range(2):
                await loop.poller.refresh_counts(loop.state.facts)
            assert loop.window.reports == before
            goes_on.set()

            async def there() -> bool:
                return loop.window.reports == before + 2

            await until(there)

    asyncio.run(story())
