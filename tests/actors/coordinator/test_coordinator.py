"""The coordinator's shell over fake actors: its start, what it answers, and what it is asked to do."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.errors import (
    CheckpointError,
    ConfigError,
    ConflictError,
    NotReadyError,
)
from elastic_moe.cluster.messages.views import Operation, Phase, RebalancePreview, Revision
from elastic_moe.cluster.placement import WorkerId
from tests.actors.coordinator import running as shared
from tests.actors.coordinator.running import (
    W0,
    W1,
    W2,
    ended,
    ready,
    running,
    until,
)
from tests.actors.fakes import FIT, MODEL

without_ray = shared.without_ray


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
