"""A coordinator that comes back, one that a redeploy changes or replaces, and nodes that come and go."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.actors import liveness
from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.control import succession
from elastic_moe.cluster.errors import (
    CheckpointError,
    PlacementError,
)
from elastic_moe.cluster.facts import homes
from elastic_moe.cluster.facts.facts import Stage
from elastic_moe.cluster.messages.views import Operation, Phase, RebalancePreview
from elastic_moe.cluster.placement import WorkerId
from tests.actors.coordinator import running as shared
from tests.actors.coordinator.running import (
    W0,
    W1,
    W2,
    busy_with_one_expert,
    control_loop,
    ended,
    ready,
    running,
    until,
)
from tests.actors.fakes import Handle

without_ray = shared.without_ray


@pytest.mark.parametrize("dead", [(), (W0,), ("engine",)])
def test_a_restarted_coordinator_goes_on_with_what_is_there(tmp_path: Path, dead: tuple[str, ...]) -> None:
    async def story() -> None:
        async with running(tmp_path) as (first, fleet):
            await ready(first)
            first._background.cancel()
            for name in dead:
                (fleet.engines[0] if name == "engine" else fleet.workers[WorkerId(name)]).dead = True
            fleet.resumes = True
            second = Coordinator(fleet.config, str(tmp_path), fleet)
            await asyncio.wait_for(second._opened.wait(), 5)
            await ready(second)
            if not dead:
                assert (await second.placement()).epoch == 1
                assert [op.kind for op in await second.operations()] == ["start"]

            async def whole() -> bool:
                return len([w for w in await second.workers() if w.state == "serving"]) == 2

            await until(whole)
            await second.shutdown()

    asyncio.run(story())


def test_a_restarted_coordinator_remembers_the_subjects(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (first, fleet):
            await ready(first)
            loop = control_loop(first)
            loop.window.add(busy_with_one_expert(), time.monotonic())
            loop._remember(time.monotonic() + 20)
            assert len(loop.memory) == 1
            first._background.cancel()
            fleet.resumes = True
            second = Coordinator(fleet.config, str(tmp_path), fleet)
            await asyncio.wait_for(second._opened.wait(), 5)
            assert len(control_loop(second).memory) == 1
            preview = await second.preview("greedy")
            assert isinstance(preview, RebalancePreview)
            await second.shutdown()

    asyncio.run(story())


def test_a_coordinator_that_dies_during_a_rebalance(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (first, fleet):
            await ready(first)
            await asyncio.sleep(0.1)

            async def stall(called: str) -> None:
                if called == "prepare":
                    await asyncio.sleep(3600)

            fleet.workers[W1].before = stall
            operation = await first.rebalance("greedy")
            assert isinstance(operation, Operation)

            async def preparing() -> bool:
                change = control_loop(first).state.facts.change
                return change is not None and change.stage is Stage.PREPARING

            await until(preparing)
            first._background.cancel()
            fleet.workers[W1].before = None
            fleet.resumes = True
            second = Coordinator(fleet.config, str(tmp_path), fleet)
            await asyncio.wait_for(second._opened.wait(), 5)
            await ready(second)
            # it was asked for, so the successor begins it again
            assert (await ended(second, operation.operation_id)).phase is Phase.COMPLETED
            assert (await second.placement()).epoch > 2
            await second.shutdown()

    asyncio.run(story())


def test_a_restarted_coordinator_adopts_a_worker_that_still_loads(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (first, fleet):
            await ready(first)
            loading = asyncio.Event()

            async def slow(called: str) -> None:
                if called == "load":
                    await loading.wait()

            make = fleet.start_worker
            made: list[WorkerId] = []

            def start_worker(worker: WorkerId, node: str | None = None) -> Any:
                made.append(worker)
                actor = make(worker)
                actor.handle.before = slow
                return actor

            fleet.start_worker = start_worker  # type: ignore[method-assign]
            operation = await first.scale(3)
            await asyncio.sleep(0.1)
            first._background.cancel()
            fleet.resumes = True
            second = Coordinator(fleet.config, str(tmp_path), fleet)
            await asyncio.wait_for(second._opened.wait(), 5)
            await ready(second)
            loading.set()
            assert (await ended(second, operation.operation_id)).phase is Phase.COMPLETED
            assert made == [W2]
            assert [w.id for w in (await second.placement()).placement.workers] == [W0, W1, W2]
            await second.shutdown()

    asyncio.run(story())


def test_a_redeploy_of_the_same_model_is_taken_over_and_outlives_the_coordinator(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)
            wanted = replace(fleet.config, workers=3, heartbeat_timeout=0.7, planner="greedy")
            await coordinator.reconfigure(wanted)
            assert (await coordinator.config()).config == fleet.config == wanted
            assert control_loop(coordinator).poller.timeout_s == 0.7

            async def scaled() -> bool:
                return (await coordinator.scaling()).serving == 3

            await until(scaled)
            with pytest.raises(PlacementError, match="expected 1 to 8"):
                await coordinator.reconfigure(replace(wanted, workers=9))
            assert (await coordinator.config()).config == wanted

            fleet.resumes = True
            successor = Coordinator(ServeConfig(), str(tmp_path), fleet)
            await ready(successor)
            assert (await successor.config()).config == wanted
            await successor.shutdown()

    asyncio.run(story())


@pytest.mark.parametrize("when", ["opens", "loads"])
def test_an_error_does_not_outlive_a_redeploy(tmp_path: Path, when: str) -> None:
    (tmp_path / "damaged").touch()

    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            fleet.error = CheckpointError("config.json is missing") if when == "opens" else None

            async def failed() -> bool:
                return (await coordinator.readiness()).error is not None

            await until(failed)
            (tmp_path / "damaged").unlink()
            fleet.error = None
            await coordinator.reconfigure(fleet.config)
            await ready(coordinator)
            assert len([handle for handle in fleet.workers.values() if not handle.dead]) == 2

    asyncio.run(story())


def test_a_cluster_that_gives_way_ends_with_its_last_replica(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)
            await coordinator.check_in("a", 1, refuses=False)
            fleet.is_wanted = False
            await coordinator.give_way()
            assert not await coordinator.check_in("a", 1, refuses=False), "requests may come until Serve has switched"
            assert not fleet.has_left
            await coordinator.check_out("a")

            async def left() -> bool:
                return fleet.has_left

            await until(left)

    asyncio.run(story())


def test_a_cluster_that_is_replaced_finishes_its_requests_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "SWITCH_S", 0.0)

    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)
            await coordinator.check_in("a", 1, refuses=False)
            fleet.is_wanted = False
            await coordinator.give_way()

            async def refuses() -> bool:
                return await coordinator.check_in("a", 1, refuses=True)

            await until(refuses)
            await asyncio.sleep(0.1)
            assert (await coordinator.readiness()).ready
            assert not fleet.has_left
            await coordinator.check_in("a", 0, refuses=True)

            async def left() -> bool:
                return fleet.has_left

            await until(left)
            assert all(worker.dead for worker in fleet.workers.values())

    asyncio.run(story())


def test_a_cluster_that_is_wanted_again_accepts_requests_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)
            await coordinator.check_in("a", 1, refuses=False)
            fleet.is_wanted = False
            await coordinator.give_way()
            fleet.is_wanted = True
            await coordinator.reconfigure(fleet.config)
            assert not await coordinator.check_in("b", 0, refuses=False)
            assert not fleet.has_left

    asyncio.run(story())


def test_what_is_waited_for_is_told_and_the_cluster_before_asked_to_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(liveness, "STARTING_S", 0.05)

    async def story() -> None:
        async with running(tmp_path, handover_timeout=0.3) as (coordinator, fleet):
            fleet.waits_for = "a GPU: the cluster has none"
            there = asyncio.Event()
            make = fleet.start_worker

            async def wait(called: str) -> None:
                await there.wait()

            def start_worker(worker: WorkerId, node: str | None = None) -> Any:
                actor = make(worker)
                actor.handle.before = wait
                return actor

            monkeypatch.setattr(fleet, "start_worker", start_worker)
            asked = asyncio.Event()

            class Before:
                async def give_way(self) -> None:
                    asked.set()

            fleet.rivals = [Remote(Handle(Before()))]

            async def told() -> bool:
                return "; w0, w1 wait for a GPU: the cluster has none" in (await coordinator.readiness()).reason

            await until(told)
            assert {worker.waits_for for worker in await coordinator.workers()} == {fleet.waits_for}
            assert not asked.is_set()
            async with asyncio.timeout(5):
                await asked.wait()
            await until(coordinator.needs_way)
            there.set()
            await ready(coordinator)
            assert not await coordinator.needs_way()
            assert {worker.waits_for for worker in await coordinator.workers()} == {None}

    asyncio.run(story())
    warned = [line for line in caplog.messages if "wait for" in line]
    assert warned == ["w0, w1 wait for a GPU: the cluster has none; Ray's autoscaler, if there is one, has been asked"]


def test_workers_on_a_node_that_leaves_are_replaced(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)
            fleet.draining = {"n0": 60.0}

            async def drained() -> bool:
                fleet.draining = {} if W2 in fleet.workers else fleet.draining
                return bool({w.id for w in await coordinator.workers() if w.state == "serving"} - {W0, W1})

            await until(drained)
            assert fleet.workers[W0].dead

    asyncio.run(story())


def test_a_node_that_has_come_gets_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the worker in whose place it starts serves until it has loaded."""
    monkeypatch.setattr(homes, "SETTLED_S", 0.05)

    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)
            fleet.free = {"n0": 1, "later": 4}

            async def moved() -> bool:
                return [worker.id for worker in await coordinator.workers() if worker.state == "serving"] == [W0, W2]

            await until(moved)
            assert fleet.places == {W0: None, W1: None, W2: "later"}
            assert not fleet.workers[W0].dead

    asyncio.run(story())
