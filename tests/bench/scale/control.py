"""The coordinator with workers that only pretend, in one process without Ray: what a cluster of a size costs it.

The model has 58 layers of 256 experts. Fake workers answer at once, and their routing counts have the real size.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import uvloop

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.messages.epochs import (
    Epoch,
    EpochSpec,
    ModelInfo,
    PhaseCounts,
    RoutingCounts,
    WorkerInfo,
    WorkerSpec,
)
from elastic_moe.cluster.messages.views import Operation, Phase
from elastic_moe.cluster.placement import WorkerId
from tests.actors.fakes import MODEL, FakeEngine, FakeWorker, Handle, PlainFleet

LAYERS, EXPERTS, CHOICES = 58, 256, 8
SAMPLED = 280
WORKERS_PER_NODE = 8
TIMEOUT_S = 120.0
POLLS_S = 12.0
"""Seconds of polling. Routing counts are fetched every 5 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlCost:
    workers: int
    start_s: float
    """Seconds from the beginning until all workers serve."""
    poll_share: float
    """Share of a core that polling takes, the fake workers included."""
    held_s: float
    """The longest time for which the event loop was held while it polled."""
    changing_held_s: float
    """The longest time for which it was held while workers were added, and when one died."""
    scale_s: float
    """Seconds in which half as many workers became all."""
    flip_s: float
    """Seconds of the flip in that."""
    death_s: float
    """Seconds from a worker's death, as the poll tells it, until the survivors serve."""
    saved_bytes: int
    """Bytes that the saved state took when it took most."""
    saves: int
    """Number of times that it was saved."""
    written_bytes: float
    """Bytes that a save wrote, in the mean."""


RNG = np.random.default_rng(0)
SAMPLE = RNG.integers(EXPERTS, size=(SAMPLED, LAYERS, CHOICES)).astype(np.uint8)
LOAD = RNG.integers(1, 100, size=(LAYERS, EXPERTS))


class BigWorker(FakeWorker):
    """It does not look at what it is told to hold, which would cost more than what is measured."""

    def load(self, spec: WorkerSpec) -> WorkerInfo:
        return replace(super().load(spec), node=f"n{int(spec.worker[1:]) // WORKERS_PER_NODE}")

    def _placed(self, spec: EpochSpec) -> set[tuple[int, int]]:
        return set()

    def routing_counts(self) -> RoutingCounts:
        prefill = PhaseCounts(tokens=SAMPLED, load=LOAD, steps_s=0.1, steps_tokens=100)
        decode = PhaseCounts(tokens=SAMPLED, load=LOAD, steps_s=0.3, steps_tokens=100)
        return RoutingCounts(prefill=prefill, decode=decode, sample=SAMPLE)


class TimedEngine(FakeEngine):
    flip_s = 0.0

    async def change_epoch(
        self, model: ModelInfo, spec: EpochSpec, workers: dict[WorkerId, Remote[Any]], infos: Any
    ) -> int:
        begin = time.perf_counter()
        try:
            return await super().change_epoch(model, spec, workers, infos)
        finally:
            self.flip_s = time.perf_counter() - begin


class BigFleet(PlainFleet):
    def __init__(self, config: ServeConfig) -> None:
        super().__init__(config)
        self.saves = self.saved_bytes = self.written_bytes = 0

    def save(self, state: bytes) -> None:
        self.saves += 1
        self.written_bytes += len(state)
        super().save(state)
        self.saved_bytes = max(self.saved_bytes, len(state) + sum(map(len, self.parts.values())))

    def save_part(self, name: str, part: bytes) -> None:
        self.written_bytes += len(part)
        super().save_part(name, part)

    def read_model(self, model_dir: str) -> ModelInfo:
        return replace(MODEL, num_layers=LAYERS, num_logical_experts=EXPERTS, top_k=CHOICES, hidden_size=7168)

    def start_worker(self, worker: WorkerId, node: str | None = None) -> Remote[Any]:
        self.workers[worker] = Handle(BigWorker())
        return Remote(self.workers[worker])

    def start_engine(self) -> Remote[Any]:
        self.engines.append(Handle(TimedEngine(self.config, None)))
        return Remote(self.engines[-1])


async def _until(condition: Callable[[], Awaitable[Any]]) -> Any:
    async with asyncio.timeout(TIMEOUT_S):
        while not (value := await condition()):
            await asyncio.sleep(0.005)
        return value


async def _measure(workers: int) -> ControlCost:
    config = ServeConfig(workers=max(1, workers // 2), rebalance_interval=0, max_workers=None)
    fleet = BigFleet(config)
    with tempfile.TemporaryDirectory() as path:
        begin = time.perf_counter()
        coordinator = Coordinator(config, path, fleet)

        async def serves() -> bool:
            return (await coordinator.readiness()).ready

        await _until(serves)
        start_s = time.perf_counter() - begin
        watch = coordinator.watch
        watch.longest_s = 0.0
        begin = time.perf_counter()
        operation = await coordinator.scale(workers=workers) if workers > 1 else None
        if operation is not None:
            await _until(lambda: _ended(coordinator, operation.operation_id))
        scale_s = time.perf_counter() - begin
        flip_s = fleet.engines[-1].target.flip_s
        changing_held_s, watch.longest_s = watch.longest_s, 0.0
        cpu, begin = time.process_time(), time.perf_counter()
        await asyncio.sleep(POLLS_S)
        poll_share = (time.process_time() - cpu) / (time.perf_counter() - begin)
        held_s, watch.longest_s = watch.longest_s, 0.0
        death_s = await _kill_one(coordinator, fleet) if workers > 1 else 0.0
        changing_held_s = max(changing_held_s, watch.longest_s)
        await coordinator.shutdown()
    return ControlCost(
        workers=workers,
        start_s=start_s,
        poll_share=poll_share,
        held_s=held_s,
        changing_held_s=changing_held_s,
        scale_s=scale_s,
        flip_s=flip_s,
        death_s=death_s,
        saved_bytes=fleet.saved_bytes,
        saves=fleet.saves,
        written_bytes=fleet.written_bytes / fleet.saves,
    )


async def _ended(coordinator: Coordinator, operation_id: str) -> Operation | None:
    operation = await coordinator.operation(operation_id)
    assert operation is not None
    assert operation.phase is not Phase.FAILED, operation
    return operation if operation.phase is Phase.COMPLETED else None


async def _kill_one(coordinator: Coordinator, fleet: BigFleet) -> float:
    epoch: Epoch = (await coordinator.placement()).epoch
    begin = time.perf_counter()
    victim = sorted(fleet.workers)[-1]
    fleet.workers[victim].dead = True
    await coordinator.report_step_failure(epoch, [victim], "the bench has ended it")

    async def without() -> bool:
        view = await coordinator.placement()
        return view.epoch > epoch and all(worker.id != victim for worker in view.placement.workers)

    await _until(without)
    return time.perf_counter() - begin


def measure(workers: int) -> ControlCost:
    # as in Ray's processes
    return uvloop.run(_measure(workers))
