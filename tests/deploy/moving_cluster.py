"""A backend of any size whose experts move when they are told to, for tests and pictures of the page."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread

import numpy as np
import numpy.typing as npt
import uvicorn

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.facts.routing import load_imbalance
from elastic_moe.cluster.messages.epochs import Epoch, ModelInfo, PhaseCounts
from elastic_moe.cluster.messages.views import (
    EngineStatus,
    Operation,
    OperationKind,
    Phase,
    PlacementView,
    RebalancePreview,
    RoutingView,
    WorkerState,
    WorkerView,
)
from elastic_moe.cluster.placement import Move, Placement, Worker, WorkerId, contiguous
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.launch.local_ray import free_port
from tests.deploy.fakes import FIT, FakeBackend


def skewed_load(layers: int, experts: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """[layers, experts] tokens, a few experts with many."""
    rng = np.random.default_rng(seed)
    return (1000 * rng.lognormal(0.0, 0.7, (layers, experts))).astype(np.int64)


@dataclass
class MovingCluster(FakeBackend):
    layers: int = 6
    experts: int = 16
    size: int = 4
    spare: int = 0
    """Slots of every worker besides its share of experts."""
    epoch: int = 1
    pinned: bool = False
    pinned_by: str | None = None
    dead: set[str] = field(default_factory=set)
    done: list[Operation] = field(default_factory=list)
    moves: tuple[Move, ...] = ()
    tokens: int = 0
    drifts: bool = False
    """Whether every look at the routing finds other loads."""

    def __post_init__(self) -> None:
        slots = self.experts // self.size
        workers = [Worker(id=WorkerId(f"w{n}"), node=f"node{n // 8}", slots=slots) for n in range(self.size)]
        table = contiguous(self.layers, self.experts, workers).physical_to_logical_map
        load = skewed_load(self.layers, self.experts)
        if self.spare:
            # the experts with most tokens are there twice
            rows = []
            for row, counts in zip(table, load, strict=True):
                hot = np.argsort(-counts)
                parts = np.split(row, self.size)
                free = [hot[np.isin(hot, part, invert=True)][: self.spare] for part in parts]
                rows.append(np.concatenate([np.concatenate([p, f]) for p, f in zip(parts, free, strict=True)]))
            table = np.array(rows)
            workers = [replace(worker, slots=slots + self.spare) for worker in workers]
        self.load = load
        self.current = Placement(
            num_logical_experts=self.experts, workers=tuple(workers), physical_to_logical_map=table
        )

    def swap(self) -> None:
        """As a re-placement that is over."""
        self.current = self.swapped()
        self.epoch += 1

    def swapped(self) -> Placement:
        """The first expert of the first worker changes places with the last one of the last, where it has no copy."""
        table = self.current.physical_to_logical_map.copy()
        for row in table:
            if (row == row[0]).sum() == (row == row[-1]).sum() == 1:
                row[[0, -1]] = row[[-1, 0]]
        return replace(self.current, physical_to_logical_map=table)

    async def model_info(self) -> ModelInfo:
        info = await super().model_info()
        return replace(info, num_layers=self.layers, num_logical_experts=self.experts)

    async def status(self) -> EngineStatus:
        self.tokens += 180 + 40 * (self.tokens % 3)
        names = [worker.id for worker in self.current.workers]
        return EngineStatus(
            running=dict.fromkeys(names, 2),
            waiting=1,
            kv_usage={name: 0.2 + 0.3 * n / len(names) for n, name in enumerate(names)},
            steps=self.tokens // 8,
            generation_tokens=self.tokens,
            prompt_tokens=self.tokens // 4,
            epoch=self.epoch,
        )

    async def placement(self) -> PlacementView:
        return PlacementView(
            epoch=Epoch(self.epoch),
            placement=self.current,
            pinned=self.pinned,
            pinned_by=self.pinned_by,
            moves=self.moves,
        )

    async def routing(self) -> RoutingView:
        if self.drifts:
            self.load = self.load + skewed_load(self.layers, self.experts, self.tokens) // 20
        phase = PhaseCounts(tokens=int(self.load[0].sum()), load=self.load)
        return RoutingView(
            tokens=phase.tokens,
            window_s=60.0,
            load=self.load,
            load_imbalance=tuple(load_imbalance(self.load, self.current).tolist()),
            prefill=phase,
            decode=phase,
            decode_weight=3.0,
        )

    async def workers(self) -> list[WorkerView]:
        return [
            WorkerView(
                id=worker.id,
                rank=rank,
                state=WorkerState.DEAD if worker.id in self.dead else WorkerState.SERVING,
                pid=1000 + rank,
                node=worker.node,
                device="cpu",
                running_requests=2,
                kv_usage=0.2,
                fit=FIT,
            )
            for rank, worker in enumerate(self.current.workers)
        ]

    async def preview(self, planner: str) -> RebalancePreview:
        return replace(await super().preview(planner), placement=self.swapped())

    async def rebalance(self, planner: str) -> Operation:
        await super().rebalance(planner)
        return self.begin(OperationKind.REBALANCE, "requested, by auto")

    async def place(self, placement: Placement, pinned: bool | None) -> Operation:
        operation = self.begin(OperationKind.REBALANCE, "requested, a given placement")
        self.placed = (placement, pinned)
        self.pinned = bool(pinned)
        self.current, self.epoch = placement, self.epoch + 1
        self.end()
        return operation

    def begin(self, kind: OperationKind, reason: str) -> Operation:
        operation = Operation(
            operation_id=f"{kind}-{len(self.done) + 1}",
            kind=kind,
            phase=Phase.PREPARING,
            epoch=Epoch(self.epoch + 1),
            reason=reason,
            progress=0.4,
        )
        self.done.insert(0, operation)
        return operation

    def end(self) -> None:
        self.done[0] = replace(self.done[0], phase=Phase.COMPLETED, progress=1.0)

    async def unpin(self) -> None:
        self.pinned, self.pinned_by = False, None

    async def operations(self) -> list[Operation]:
        return list(self.done)


@dataclass
class SeveralGroups(MovingCluster):
    """The first of several groups, and the whole server."""

    others: tuple[MovingCluster, ...] = ()

    @property
    def num_groups(self) -> int:  # type: ignore[override]
        return 1 + len(self.others)

    def group(self, number: int) -> FakeBackend:
        groups = (self, *self.others)
        if number >= len(groups):
            raise RequestError(f"engine: expected 0 to {len(groups) - 1}, got {number}", param="engine")
        return groups[number]


@contextmanager
def served(backend: FakeBackend, model_dir: Path, *, at_port: int | None = None, **settings: object) -> Iterator[str]:
    """The API over `backend` at a port of its own, in a thread. Gives its address."""
    service = Service(ServeConfig.from_mapping(settings), backend, str(model_dir))
    port = at_port or free_port()
    app = create_app(service)
    asyncio.run(service.begin())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical", lifespan="off"))
    thread = Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
