"""Workers and an engine that only pretend, as plain classes: called directly, or as real Ray actors."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError

from elastic_moe.actors.coordinator.fleet import Fleet, RayFleet
from elastic_moe.actors.coordinator.migrator import Migrator
from elastic_moe.actors.remote.ask import Remote, ask, in_group
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import CheckpointError, PlacementError, StepAborted
from elastic_moe.cluster.facts.routing import joined
from elastic_moe.cluster.fit import CodePath, FitReport, Part, PartFit
from elastic_moe.cluster.messages.epochs import (
    Epoch,
    EpochSpec,
    ExpertCopy,
    FetchSource,
    ModelInfo,
    NodeReport,
    PhaseCounts,
    RoutingCounts,
    StallCause,
    TierCounts,
    WorkerInfo,
    WorkerSpec,
)
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.messages.views import EngineStatus
from elastic_moe.cluster.placement import WorkerId
from elastic_moe.cluster.redeploy import Generation
from elastic_moe.optimizer import PlacementProblem, PlanResult, plan
from tests.cluster.simulation import MODEL as SIMULATED

FIT = FitReport(
    rows=(PartFit(part=Part.EXPERTS, modules="MoE layers", count=2, path=CodePath.TORCH, reason="they are pretended"),)
)
MODEL = replace(SIMULATED, num_layers=2)

LOAD = np.array([[90, 80, 70, 60, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7, 8]], dtype=np.int64)
"""Uneven under the first placement, so that any planner finds a better one."""


class FakeWorker:
    """Keeps the contract of an WorkerActor: refuses to prepare what it does not hold, drops what is not placed.

    A file `slow-<method>` in the model's directory makes that method take two seconds.
    """

    def __init__(self) -> None:
        self._held: set[tuple[int, int]] = set()
        self._prepared: dict[Epoch, EpochSpec] = {}
        self._epoch = Epoch(0)
        self._dir = Path()
        self._id = WorkerId("")

    @in_group("io")
    def warm_up(self) -> int:
        return os.getpid()

    @in_group("io")
    def load(self, spec: WorkerSpec) -> WorkerInfo:
        self.spec, self._dir, self._id = spec, Path(spec.model.path), spec.worker
        self._delay("load")
        if (self._dir / "damaged").exists():
            raise CheckpointError("shard 3 is damaged")
        self._held = {(layer, e) for layer, experts in enumerate(spec.experts) for e in experts}
        return WorkerInfo(
            worker=spec.worker,
            node=ray.get_runtime_context().get_node_id() if ray.is_initialized() else "n0",
            endpoint=Endpoint(address="127.0.0.1", port=1, token=""),
            pid=os.getpid(),
            device="cpu",
            num_kv_blocks=10,
            memory_bytes=1,
            fit=FIT,
        )

    @in_group("io")
    def commit(self, epoch: Epoch) -> None:
        if self._epoch == epoch:
            return
        if epoch not in self._prepared:
            raise StepAborted(f"epoch {epoch} was not prepared")
        spec = self._prepared.pop(epoch)
        self._held &= self._placed(spec)
        self._epoch = epoch

    def _placed(self, spec: EpochSpec) -> set[tuple[int, int]]:
        layers = range(spec.placement.num_layers)
        return {(layer, e) for layer in layers for e in spec.placement.resident(self._id, layer)}

    @in_group("io")
    def load_progress(self) -> float:
        return 0.5

    @in_group("joins")
    def open_door(self) -> Endpoint:
        return Endpoint(address="127.0.0.1", port=1, token="")

    @in_group("joins")
    def prepare(self, spec: EpochSpec) -> None:
        self._delay("prepare")
        if not self._placed(spec) <= self._held:
            raise PlacementError(f"{self._id} does not hold all of {sorted(self._placed(spec))}")
        self._prepared[spec.epoch] = spec

    @in_group("io")
    def abandon(self, epoch: Epoch) -> None:
        self._prepared.pop(epoch, None)

    @in_group("copies")
    def export_experts(self, pairs: list[tuple[int, int]], target: WorkerId) -> list[ExpertCopy]:
        self._delay("export_experts")
        for layer, expert in pairs:
            if (layer, expert) not in self._held:
                raise PlacementError(f"{self._id} does not hold expert {expert} of layer {layer}")
        raw = {"w": np.zeros(8, np.uint8)}
        return [ExpertCopy(layer=layer, expert=expert, tensors=raw, digest="d", shapes={}) for layer, expert in pairs]

    @in_group("copies")
    def import_experts(self, copies: list[ExpertCopy]) -> None:
        if (self._dir / "damage-copies").exists():
            raise PlacementError("arrived damaged")
        self._held.update((copy.layer, copy.expert) for copy in copies)

    @in_group("io")
    def read_experts(self, pairs: list[tuple[int, int]]) -> None:
        self._held.update(pairs)

    @in_group("io")
    def report(self, others: NodeReport | None = None) -> NodeReport:
        own = NodeReport(
            counts=self.routing_counts(), tiers={self._id: self.tier_counts()}, link_gbps={self._id: self.link_gbps()}
        )
        return own if others is None else joined(others, own, np.random.default_rng(0))

    @in_group("io")
    def routing_counts(self) -> RoutingCounts:
        return RoutingCounts(
            prefill=PhaseCounts(tokens=6, load=LOAD - LOAD // 2, steps_s=0.1, steps_tokens=100),
            decode=PhaseCounts(tokens=4, load=LOAD // 2, steps_s=0.3, steps_tokens=100),
            sample=np.zeros((10, 2, 1), dtype=np.uint8),
        )

    @in_group("io")
    def tier_counts(self) -> TierCounts:
        return TierCounts(
            accesses=(8, 0, 2),
            fetched_bytes={FetchSource.DISK: 100},
            stall_s={StallCause.MISS: 0.5},
            resident=len(self._held),
        )

    @in_group("io")
    def link_gbps(self) -> dict[WorkerId, float]:
        return {}

    @in_group("io")
    def ping(self) -> None: ...

    @in_group("io")
    def abort_step(self, epoch: Epoch) -> None: ...

    @in_group("io")
    def ping_step(self) -> None: ...

    def _delay(self, method: str) -> None:
        if (self._dir / f"slow-{method}").exists():
            time.sleep(2)


class FakeEngine:
    """Commits epochs, and runs nothing. The file `waiting` in `model_dir` says how many requests wait."""

    model_dir: Path | None = None

    def __init__(self, config: ServeConfig, coordinator: Any) -> None:
        self._epoch = Epoch(0)

    async def change_epoch(
        self, model: ModelInfo, spec: EpochSpec, workers: dict[WorkerId, Remote[Any]], infos: Any
    ) -> int:
        members = [worker.id for worker in spec.placement.workers]
        assert set(members) <= set(workers)
        calls = (wrap(ask(workers[worker], FakeWorker.commit, spec.epoch)) for worker in members)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        if failed := [w for w, a in zip(members, answers, strict=True) if isinstance(a, BaseException)]:
            raise StepAborted(f"not committed by {failed}")
        self._epoch = spec.epoch
        return 0

    async def drain(self, workers: tuple[WorkerId, ...]) -> None: ...

    async def lose(self, worker: WorkerId) -> None: ...

    async def reach(self, endpoints: dict[WorkerId, Endpoint]) -> None: ...

    async def stay(self) -> None:
        await asyncio.Event().wait()

    async def status(self) -> EngineStatus:
        if self.model_dir is None:
            return EngineStatus(epoch=self._epoch, running={WorkerId("w0"): 3})
        waiting = self.model_dir / "waiting"
        return EngineStatus(epoch=self._epoch, waiting=int(waiting.read_text()) if waiting.exists() else 0)


async def wrap(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


FAKE = Generation("fake")


class FakeRayFleet(RayFleet):
    """Real actors of the fake classes; no checkpoint is read."""

    def __init__(self, config: ServeConfig, generation: Generation = FAKE, *, alone: bool = True) -> None:
        super().__init__(config, generation, alone=alone, worker_class=FakeWorker, engine_class=FakeEngine)

    def read_model(self, model_dir: str) -> ModelInfo:
        return MODEL


class Handle:
    """A plain object behind the calls of a Ray handle. A dead one answers as Ray does."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.dead = False
        self.before: Callable[[str], Awaitable[None]] | None = None
        """Awaited before every call, with the method's name: where tests inject faults."""

    def __getattr__(self, method: str) -> Any:
        return _Method(self, method)


class _Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self._handle = handle
        self._name = name

    def remote(self, *arguments: Any, **named: Any) -> Awaitable[Any]:
        call = asyncio.ensure_future(self._call(*arguments, **named))
        # as with Ray, an error that nobody asks for is nobody's
        call.add_done_callback(lambda done: done.cancelled() or done.exception())
        return call

    async def _call(self, *arguments: Any, **named: Any) -> Any:
        await asyncio.sleep(0)
        if self._handle.before is not None:
            await self._handle.before(self._name)
        if self._handle.dead:
            raise ActorDiedError()
        arguments = tuple([await a if isinstance(a, asyncio.Future) else a for a in arguments])
        result = getattr(self._handle.target, self._name)(*arguments, **named)
        return await result if asyncio.iscoroutine(result) else result


def alive(handle: Handle | None) -> Remote[Any] | None:
    return None if handle is None or handle.dead else Remote(handle)


class PlainFleet:
    """No Ray at all."""

    shared_gpus = False
    gpu_workers = 1

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.standby = False
        self.workers: dict[WorkerId, Handle] = {}
        self.engines: list[Handle] = []
        self.error: Exception | None = None
        self.last_saved: bytes | None = None
        self.parts: dict[str, bytes] = {}
        self.resumes = False
        self.is_wanted = True
        self.threads = 2
        self.groups: int | None = None
        """Number of groups that an admin call has asked for."""
        self.rivals: list[Remote[Any]] = []
        self.has_left = False
        self.waits_for: str | None = None
        self.draining: dict[str, float | None] = {}
        self.free: dict[str, int] = {}
        self.places: dict[WorkerId, str | None] = {}
        """Where each worker was to run."""

    def attach(self) -> None: ...

    def clear(self) -> None: ...

    @property
    def store(self) -> PlainFleet:
        return self

    def save(self, state: bytes) -> None:
        self.last_saved = state

    def saved(self) -> bytes | None:
        return self.last_saved if self.resumes else None

    def save_part(self, name: str, part: bytes) -> None:
        self.parts[name] = part

    def saved_part(self, name: str) -> bytes | None:
        return self.parts.get(name)

    def drop_part(self, name: str) -> None:
        del self.parts[name]

    def find_worker(self, worker: WorkerId) -> Remote[Any] | None:
        return alive(self.workers.get(worker))

    def find_engine(self) -> Remote[Any] | None:
        return alive(self.engines[-1] if self.engines else None)

    def find_migrator(self) -> Remote[Any] | None:
        return None

    def read_model(self, model_dir: str) -> ModelInfo:
        if self.error is not None:
            raise self.error
        return MODEL

    def configure(self, config: ServeConfig) -> None:
        self.config = config

    def wanted(self, groups: int) -> bool:
        return self.is_wanted

    def num_groups(self, configured: int) -> int:
        return configured if self.groups is None else self.groups

    def others(self) -> list[Remote[Any]]:
        return self.rivals

    def beside(self, group: int) -> Fleet:
        raise AssertionError(group)

    def leave(self) -> None:
        self.has_left = True

    def device(self) -> str:
        return "cpu"

    def settle_device(self, device: str) -> None:
        assert device == "cpu"

    def shortage(self) -> str | None:
        return self.waits_for

    def free_cores(self) -> dict[str, int]:
        return self.free

    def draining_nodes(self) -> dict[str, float | None]:
        return self.draining

    num_nodes = 1

    def node_threads(self) -> int:
        return self.threads

    def start_worker(self, worker: WorkerId, node: str | None = None) -> Remote[Any]:
        self.workers[worker], self.places[worker] = Handle(FakeWorker()), node
        return Remote(self.workers[worker])

    def start_engine(self) -> Remote[Any]:
        self.engines.append(Handle(FakeEngine(self.config, None)))
        return Remote(self.engines[-1])

    def start_migrator(self, expert_bytes: int) -> Remote[Any]:
        return Remote(Handle(Migrator(expert_bytes)))

    def kill(self, actor: Remote[Any]) -> None:
        actor.handle.dead = True

    def kill_worker(self, actor: Remote[Any], info: WorkerInfo | None) -> None:
        self.kill(actor)

    async def solve(
        self, problem: PlacementProblem, planner: str, deadline_s: float, solver: str, *, urgent: bool = False
    ) -> PlanResult:
        return plan(problem, planner=planner, deadline_s=deadline_s, solver=solver)
