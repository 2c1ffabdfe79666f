"""What becomes of a coordinator's cluster when workers, engines or the migrator die or hang."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.actors import liveness
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.errors import (
    StepAborted,
)
from elastic_moe.cluster.messages.views import Operation, Phase
from elastic_moe.cluster.placement import WorkerId
from tests.actors.coordinator import running as shared
from tests.actors.coordinator.running import (
    W0,
    W1,
    W2,
    control_loop,
    ended,
    ready,
    running,
    until,
)

without_ray = shared.without_ray


@pytest.mark.parametrize("method", ["export_experts", "import_experts", "prepare", "commit"])
@pytest.mark.parametrize("victim", [W0, W1])
def test_a_worker_that_dies_during_a_rebalance(tmp_path: Path, method: str, victim: WorkerId) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)
            await asyncio.sleep(0.1)

            async def die(called: str) -> None:
                if called == method:
                    fleet.workers[victim].dead = True

            fleet.workers[victim].before = die
            operation = await coordinator.rebalance("greedy")
            assert isinstance(operation, Operation)
            # it is planned again for the workers that there are then
            assert (await ended(coordinator, operation.operation_id)).phase is Phase.COMPLETED

            async def replaced() -> bool:
                serving = [w.id for w in await coordinator.workers() if w.state == "serving"]
                return len(serving) == 2 and victim not in serving

            await until(replaced)
            await ready(coordinator)
            kinds = [(op.kind, op.phase) for op in await coordinator.operations()]
            assert ("recover", Phase.COMPLETED) in kinds

    asyncio.run(story())


def test_the_engine_reports_a_failed_step(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)
            fleet.workers[W0].dead = True
            epoch = (await coordinator.placement()).epoch
            await coordinator.report_step_failure(epoch, [W0], "w0: ActorDiedError: The actor is dead. Because.")
            assert not (await coordinator.readiness()).ready
            await ready(coordinator)
            assert (await coordinator.placement()).placement.workers[0].id == W1

    asyncio.run(story())


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)

            async def hang(called: str) -> None:
                await asyncio.sleep(3600)

            fleet.workers[W0].before = hang

            async def gone() -> bool:
                return fleet.workers[W0].dead

            await until(gone)
            await ready(coordinator)

    asyncio.run(story())


def test_a_lost_engine_is_replaced(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)
            fleet.engines[0].dead = True

            async def another() -> bool:
                return await coordinator.engine() == Remote(fleet.engines[-1]) and len(fleet.engines) == 2

            await until(another)
            await ready(coordinator)
            assert [op.kind for op in await coordinator.operations()] == ["recover", "start"]

    asyncio.run(story())


def test_the_death_of_an_engine_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            watched, dying = asyncio.Event(), asyncio.Event()
            await ready(coordinator)
            engine = fleet.engines[0]

            async def die(called: str) -> None:
                if called == "stay":
                    watched.set()
                    await dying.wait()
                    engine.dead = True

            engine.before = die
            # of an engine that is not watched yet
            control_loop(coordinator).poller._watched = None
            await watched.wait()
            monkeypatch.setattr(liveness, "POLL_S", 3600)
            dying.set()

            async def another() -> bool:
                return len(fleet.engines) == 2

            await until(another)
            await ready(coordinator)

    asyncio.run(story())


def test_the_loss_of_an_engine_is_reported_once(tmp_path: Path) -> None:
    """By the poll, or by a commit that it cut off: the second to notice must not end the successor."""

    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)
            processes = control_loop(coordinator).processes
            old = processes.engine
            assert processes.drop_engine(old, "died") is not None
            processes.ensure_engine()
            assert processes.drop_engine(old, "died") is None
            assert processes.engine == Remote(fleet.engines[-1])
            assert not fleet.engines[-1].dead

    asyncio.run(story())


def test_workers_with_a_late_step_are_pinged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "SUSPECT_TIMEOUT_S", 0.1)

    async def story() -> None:
        async with running(tmp_path, heartbeat_timeout=60) as (coordinator, fleet):
            await ready(coordinator)
            await coordinator.report_late_step([W0, W1])
            assert (await coordinator.readiness()).ready, "it was slow, and no more"
            await asyncio.sleep(0.1)

            async def hang(called: str) -> None:
                await asyncio.sleep(3600)

            fleet.workers[W1].before = hang
            await coordinator.report_late_step([W0, W1])
            assert fleet.workers[W1].dead
            await ready(coordinator)

    asyncio.run(story())


@pytest.mark.parametrize("spare", ["there", "dead", "hangs"])
def test_a_spare_process_becomes_the_next_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: str) -> None:
    monkeypatch.setattr(liveness, "SUSPECT_TIMEOUT_S", 0.1)

    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            fleet.standby = True
            await ready(coordinator)
            called: list[str] = []

            async def note(method: str) -> None:
                called.append(method)
                if spare == "hangs" and method != "warm_up":
                    await asyncio.sleep(3600)

            make = fleet.start_worker

            def start_worker(worker: WorkerId, node: str | None = None) -> Any:
                actor = make(worker)
                actor.handle.before = note if worker == W2 else None
                return actor

            monkeypatch.setattr(fleet, "start_worker", start_worker)

            async def warmed() -> bool:
                return called == ["warm_up"]

            await until(warmed)

            async def stands_by() -> bool:
                return [(w.id, w.state) for w in await coordinator.workers()][2:] == [(W2, "standby")]

            await until(stands_by)
            process = fleet.workers[W2]
            process.dead = spare == "dead"
            fleet.workers[W0].dead = True

            async def replaced() -> bool:
                serving = [w.id for w in await coordinator.workers() if w.state == "serving"]
                return len(serving) == 2 and W0 not in serving

            await until(replaced)
            ids = [worker.id for worker in (await coordinator.placement()).placement.workers]
            assert ids == [W1, WorkerId("w3") if spare == "hangs" else W2]
            assert (fleet.workers[W2] is process) is (spare != "dead")
            assert process.dead is (spare != "there")

    asyncio.run(story())


def test_a_migrator_that_hangs_is_ended_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PROBE_TIMEOUT_S", 0.1)

    async def story() -> None:
        async with running(tmp_path) as (coordinator, _):
            await ready(coordinator)
            await asyncio.sleep(0.1)

            async def hang(called: str) -> None:
                await asyncio.sleep(3600)

            migrator = control_loop(coordinator).processes.migrator.handle
            migrator.before = hang
            operation = await coordinator.rebalance("greedy")
            assert isinstance(operation, Operation)

            async def noted() -> bool:
                told = await coordinator.operation(operation.operation_id)
                return told is not None and told.error == "the migrator failed: no answer in time"

            await until(noted)
            assert (await ended(coordinator, operation.operation_id)).phase is Phase.COMPLETED
            assert migrator.dead

    asyncio.run(story())


def test_a_worker_that_hangs_while_it_loads_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "LOADING_PATIENCE", 0.5)

    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)
            frozen = asyncio.Event()

            async def hang(called: str) -> None:
                if called == "load" or frozen.is_set():
                    await asyncio.sleep(3600)

            make = fleet.start_worker

            def start_worker(worker: WorkerId, node: str | None = None) -> Any:
                actor = make(worker)
                actor.handle.before = hang if worker == W2 else None
                return actor

            monkeypatch.setattr(fleet, "start_worker", start_worker)
            operation = await coordinator.scale(3)
            await asyncio.sleep(0.2)
            assert "loading" not in (await coordinator.readiness()).reason
            frozen.set()
            assert (await ended(coordinator, operation.operation_id)).phase is Phase.COMPLETED
            assert fleet.workers[W2].dead

    asyncio.run(story())


def test_a_worker_whose_step_hangs_is_ended_although_it_answers(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)

            async def hang(called: str) -> None:
                if called == "commit":
                    raise StepAborted("the step before has not returned")
                if called == "ping_step":
                    await asyncio.sleep(3600)

            fleet.workers[W1].before = hang
            await coordinator.report_step_failure((await coordinator.placement()).epoch, [W1], "w1: no answer in time")

            async def gone() -> bool:
                return fleet.workers[W1].dead

            await until(gone)
            await ready(coordinator)

    asyncio.run(story())
