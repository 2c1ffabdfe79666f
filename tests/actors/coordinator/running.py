"""A coordinator over fake actors, in one process: Ray is never started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from elastic_moe.actors import liveness
from elastic_moe.actors.coordinator.control_loop import ControlLoop
from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.messages.epochs import PhaseCounts, RoutingCounts
from elastic_moe.cluster.messages.views import Operation, Phase
from elastic_moe.cluster.placement import WorkerId
from tests.actors.fakes import MODEL, PlainFleet

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


def busy_with_one_expert() -> RoutingCounts:
    load = np.ones((MODEL.num_layers, MODEL.num_logical_experts), dtype=np.int64)
    load[:, 0] = 10**5
    none = PhaseCounts(tokens=0, load=np.zeros_like(load))
    decode = PhaseCounts(tokens=int(load[0].sum()), load=load)
    return RoutingCounts(prefill=none, decode=decode, sample=np.zeros((0, MODEL.num_layers, 1), dtype=np.uint8))
