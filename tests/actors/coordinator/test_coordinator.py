"""The coordinator's shell over fake actors, in one process: Ray is never started."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from elastic_moe.actors import liveness
from elastic_moe.actors.coordinator.control_loop import ControlLoop
from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.control import succession
from elastic_moe.cluster.errors import (
    CheckpointError,
    ConfigError,
    ConflictError,
    NotReadyError,
    PlacementError,
    StepAborted,
)
from elastic_moe.cluster.facts import homes
from elastic_moe.cluster.facts.facts import Stage
from elastic_moe.cluster.messages.epochs import PhaseCounts, RoutingCounts
from elastic_moe.cluster.messages.views import Operation, Phase, RebalancePreview, Revision
from elastic_moe.cluster.placement import WorkerId
from tests.actors.fakes import FIT, MODEL, Handle, PlainFleet

W0, W1, W2 = WorkerId("w0"), WorkerId("w1"), WorkerId("w2")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("this test needs no Ray")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(liveness, "TICK_S", 0.01)
    monkeypatch.setattr(liveness, "POLL_S", 0.02)
    monkeypatch.setattr(liveness, "STANDBY_AFTER_S", 0.05)
    monkeypatch.setattr(liveness, "CHECK_IN_S", 0.1)


@asynccontextmanager
async def running(path: Path, **settings: Any) -> AsyncIterator[tuple[Coordinator, PlainFleet]]:
    config = ServeConfig(
        **{"workers": 2, "rebalance_interval": 0, "heartbeat_timeout": 0.5, "drain_timeout": 0.2, **settings}
    )
    fleet = PlainFleet(config)
    coordinator = Coordinator(config, str(path), fleet)
    yield coordinator, fleet
    await coordinator.shutdown()
    assert all(actor.dead for actor in fleet.workers.values())
    await asyncio.sleep(0.01)


def control_loop(coordinator: Coordinator) -> ControlLoop:
    assert coordinator._loop is not None
    return coordinator._loop


async def until(condition: Callable[[], Awaitable[Any]], timeout_s: float = 5.0) -> Any:
    async with asyncio.timeout(timeout_s):
        while not (value := await condition()):
            await asyncio.sleep(0.01)
        return value


async def ready(coordinator: Coordinator) -> None:
    async def serves() -> bool:
        readiness = await coordinator.readiness()
        assert readiness.error is None
        return readiness.ready

    await until(serves)


async def ended(coordinator: Coordinator, operation_id: str) -> Operation:
    async def operation() -> Operation | None:
        current = await coordinator.operation(operation_id)
        assert current is not None
        return current if current.phase in (Phase.COMPLETED, Phase.FAILED) else None

    return await until(operation)


def test_views_during_and_after_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            assert (await coordinator.readiness()).reason == "opening the checkpoint"
            with pytest.raises(NotReadyError):
                await coordinator.placement()
            await ready(coordinator)
            assert await coordinator.model_info() == MODEL
            assert (await coordinator.placement()).epoch == 1
            assert await coordinator.engine() == Remote(fleet.engines[0])
            await asyncio.sleep(0.1)
            workers = await coordinator.workers()
            assert [(w.id, w.rank, w.state, w.running_requests) for w in workers] == [
                (W0, 0, "serving", 3),
                (W1, 1, "serving", 0),
            ]
            assert [w.fit for w in workers] == [FIT] * 2
            routing = await coordinator.routing()
            assert routing.tokens > 0
            assert routing.load_imbalance[0] > 1.5
            (operation,) = await coordinator.operations()
            assert (operation.kind, operation.phase) == ("start", Phase.COMPLETED)
            view = await coordinator.cluster(Revision())
            assert (view.workers, view.operations) == (workers, [operation])
            assert view.placement == await coordinator.placement()
            assert view.load is not None
            assert (view.load.load == routing.load).all()
            assert view.load.load_imbalance == pytest.approx(np.mean(routing.load_imbalance))
            assert view.status is not None
            assert (view.status.running, view.scale.next_worker) == ({W0: 3}, "w2")
            again = await coordinator.cluster(view.revision)
            assert (again.placement, again.load, again.revision) == (None, None, view.revision)

    asyncio.run(story())
    served = [line for line in caplog.messages if "is served by" in line]
    assert sorted(served) == [f"{worker} is served by {FIT.text()}" for worker in (W0, W1)]


def test_a_checkpoint_that_cannot_be_opened(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            fleet.error = CheckpointError("config.json is missing")
            await asyncio.sleep(0.1)
            assert (await coordinator.readiness()).error == "config.json is missing"
            with pytest.raises(NotReadyError, match=r"config\.json"):
                await coordinator.model_info()

    asyncio.run(story())


def test_a_checkpoint_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "damaged").touch()

    async def story() -> None:
        async with running(tmp_path) as (coordinator, _):

            async def error() -> str | None:
                return (await coordinator.readiness()).error

            assert await until(error) == "shard 3 is damaged"

    asyncio.run(story())


@pytest.mark.parametrize(
    ("settings", "message"), [({"workers": 9}, "1 to 8"), ({"max_model_len": 65}, "the model allows 64")]
)
def test_settings_that_the_model_does_not_allow(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    async def story() -> None:
        async with running(tmp_path, **settings) as (coordinator, _):
            await asyncio.sleep(0.1)
            assert message in ((await coordinator.readiness()).error or "")

    asyncio.run(story())


def test_rebalance(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, _):
            await ready(coordinator)
            await asyncio.sleep(0.1)
            with pytest.raises(ConfigError, match="planner"):
                await coordinator.preview("crystal ball")
            preview = await coordinator.preview("greedy")
            assert isinstance(preview, RebalancePreview)
            assert preview.load_imbalance_after < preview.load_imbalance_before
            assert (await coordinator.placement()).epoch == 1
            operation = await coordinator.rebalance("greedy")
            assert isinstance(operation, Operation)
            with pytest.raises(ConflictError, match=operation.operation_id):
                await coordinator.rebalance("greedy")
            assert (await ended(coordinator, operation.operation_id)).phase is Phase.COMPLETED
            assert (await coordinator.placement()).epoch == 2
            counters = await coordinator.counters()
            assert counters.rebalances["completed"] == 1
            assert counters.experts_moved == preview.moves
            assert counters.bytes_moved == preview.bytes

    asyncio.run(story())


def test_periodic_rebalance(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path, rebalance_interval=0.05, planner="greedy") as (coordinator, _):
            await ready(coordinator)

            async def looked() -> int:
                return sum((await coordinator.counters()).rebalances.values())

            await until(looked)

    asyncio.run(story())


def test_a_forced_plan_that_makes_steps_longer_is_undone(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path, rebalance_interval=0.5, planner="greedy") as (coordinator, _):
            await ready(coordinator)
            await asyncio.sleep(0.1)
            for planner in ("greedy", "contiguous"):
                operation = await coordinator.rebalance(planner)
                await ended(coordinator, operation.operation_id)
                if planner == "greedy":
                    good = (await coordinator.placement()).placement

            async def undone() -> bool:
                return (await coordinator.counters()).rebalances["undone"] == 1

            await until(undone)
            undo = next(op for op in await coordinator.operations() if op.reason.startswith(operation.operation_id))
            assert "had made steps" in undo.reason
            assert (await ended(coordinator, undo.operation_id)).phase is Phase.COMPLETED
            assert (await coordinator.placement()).placement == good

    asyncio.run(story())


@pytest.mark.parametrize("method", ["export_expert", "import_expert", "prepare", "commit"])
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
            assert (await ended(coordinator, operation.operation_id)).phase is Phase.FAILED

            async def replaced() -> bool:
                serving = [w.id for w in await coordinator.workers() if w.state == "serving"]
                return len(serving) == 2 and victim not in serving

            await until(replaced)
            await ready(coordinator)
            kinds = [(op.kind, op.phase) for op in await coordinator.operations()]
            assert ("recover", Phase.COMPLETED) in kinds

    asyncio.run(story())


def test_a_damaged_copy_fails_the_rebalance_and_harms_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, _):
            await ready(coordinator)
            await asyncio.sleep(0.1)
            (tmp_path / "damage-copies").touch()
            operation = await coordinator.rebalance("greedy")
            assert isinstance(operation, Operation)
            failed = await ended(coordinator, operation.operation_id)
            assert failed.phase is Phase.FAILED
            assert "arrived damaged" in (failed.error or "")
            assert (await coordinator.readiness()).ready
            assert (await coordinator.placement()).epoch == 1

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


def test_scale_up_and_down(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, fleet):
            await ready(coordinator)
            operation = await coordinator.scale(4)
            assert (await ended(coordinator, operation.operation_id)).phase is Phase.COMPLETED
            assert len((await coordinator.placement()).placement.workers) == 4
            operation = await coordinator.scale(retire=(W0, W1))
            await ended(coordinator, operation.operation_id)
            assert [w.id for w in (await coordinator.placement()).placement.workers] == [W2, WorkerId("w3")]
            assert fleet.workers[W0].dead

    asyncio.run(story())


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


def busy_with_one_expert() -> RoutingCounts:
    load = np.ones((MODEL.num_layers, MODEL.num_logical_experts), dtype=np.int64)
    load[:, 0] = 10**5
    none = PhaseCounts(tokens=0, load=np.zeros_like(load))
    decode = PhaseCounts(tokens=int(load[0].sum()), load=load)
    return RoutingCounts(prefill=none, decode=decode, sample=np.zeros((0, MODEL.num_layers, 1), dtype=np.uint8))


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
            assert (await ended(second, operation.operation_id)).error == "the coordinator was restarted"
            assert (await second.placement()).epoch == 1
            await asyncio.sleep(0.1)
            again = await second.rebalance("greedy")
            assert isinstance(again, Operation)
            assert (await ended(second, again.operation_id)).phase is Phase.COMPLETED
            await second.shutdown()

    asyncio.run(story())


def test_scaling_again_under_the_same_id_is_the_same_operation(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, _):
            await ready(coordinator)
            first = await coordinator.scale(3, (), "mine")
            assert (await coordinator.scale(3, (), "mine")).operation_id == first.operation_id == "mine"
            with pytest.raises(ConflictError, match="mine"):
                await coordinator.scale(2)
            done = await ended(coordinator, "mine")
            assert (done.progress, done.safe_to_terminate) == (1.0, False)
            await coordinator.scale(None, (W0,), "away")
            assert (await ended(coordinator, "away")).safe_to_terminate

    asyncio.run(story())


def test_a_placement_that_was_saved_is_loaded_and_pinned(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (coordinator, _):
            await ready(coordinator)
            await asyncio.sleep(0.1)
            saved = (await coordinator.placement()).placement
            operation = await coordinator.rebalance("greedy")
            assert isinstance(operation, Operation)
            await ended(coordinator, operation.operation_id)
            assert (await coordinator.placement()).placement != saved
            operation = await coordinator.place(saved, True)
            assert (await ended(coordinator, operation.operation_id)).phase is Phase.COMPLETED
            view = await coordinator.placement()
            assert (view.placement, view.pinned) == (saved, True)
            await coordinator.unpin()
            assert not (await coordinator.placement()).pinned

    asyncio.run(story())


def test_the_autoscaler_sees_the_engine(tmp_path: Path) -> None:
    """The fake engine runs three requests, more than one worker's two seats."""

    async def story() -> None:
        async with running(tmp_path, workers=1, max_workers=2, max_num_seqs=2, autoscale_window=1) as (coordinator, _):
            await ready(coordinator)

            async def two() -> bool:
                return len((await coordinator.placement()).placement.workers) == 2

            await until(two)
            assert "autoscale from 1 to 2 workers: demand 150%" in (await coordinator.operations())[0].reason

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
            failed = await ended(coordinator, operation.operation_id)
            assert failed.error == "the migrator failed: no answer in time"
            assert migrator.dead
            again = await coordinator.rebalance("greedy")
            assert isinstance(again, Operation)
            assert (await ended(coordinator, again.operation_id)).phase is Phase.COMPLETED

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


# --- Redeploys ----------------------------------------------------------------------------------------------------


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


# --- Nodes --------------------------------------------------------------------------------------------------------


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
