"""Runs the production scheduler and production workers as threads of one process: the whole data plane without Ray."""

from __future__ import annotations

import sys
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster import placement as placements
from elastic_moe.cluster.facts.membership import needs
from elastic_moe.cluster.facts.transfers import plan_transfers
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, ModelSpec, WorkerSpec
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, SamplingParams, TokenOutput
from elastic_moe.cluster.messages.steps import StepResult
from elastic_moe.cluster.placement import Placement, Tier, TierArray, WorkerId
from elastic_moe.model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from elastic_moe.model.exchange import shared_memory
from elastic_moe.model.worker import loaded_model
from elastic_moe.model.worker.data_plane import DataPlane
from elastic_moe.model.worker.runner import ModelRunner
from tests.model.groups import workers as make_workers

BUNDLE = 5
"""Experts that go together between two workers."""


def with_pinned(placement: Placement, pinned: int, hosted: int = 0) -> Placement:
    """The placement with the first `pinned` experts of every worker and layer in its device, the next `hosted` ones in
    the memory beside it, and the others on its disk."""
    numbers = np.concatenate([np.arange(worker.slots) for worker in placement.workers])
    outside = np.where(numbers < pinned + hosted, Tier.HOST, Tier.DISK)
    tiers = np.where(numbers < pinned, Tier.DEVICE, outside)
    return replace(placement, tiers=np.tile(tiers.astype(np.int8), (placement.num_layers, 1)))


def request(name: str, prompt: Sequence[int], **params: object) -> GenerateRequest:
    fields = {"max_tokens": 64, "temperature": 0.0, "ignore_eos": True} | params
    return GenerateRequest(
        request_id=RequestId(name),
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**fields),  # type: ignore[arg-type]
    )


def let_threads_take_turns() -> None:
    """The workers of a Lockstep are threads of one interpreter, of which one runs at a time. One that waits for the
    others sleeps at once: by yielding its core it would ask for the interpreter thousands of times a second. One that
    needs the interpreter gets it after 0.2 ms instead of 5, since a layer's exchange passes it on many times.
    """
    shared_memory._YIELDS = 0
    sys.setswitchinterval(0.0002)


def opened(path: str | Path) -> Checkpoint:
    """As `open_checkpoint`, once for files that stay as they are: what it finds is never changed."""
    files = sorted(Path(path).iterdir())
    stamps = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _opened(Path(path), stamps)


@cache
def _opened(path: Path, stamps: tuple[tuple[str, int, int], ...]) -> Checkpoint:
    return open_checkpoint(path)


class Lockstep:
    """A cluster in a process. `step` waits for one step of every worker; `replace` flips to another placement."""

    def __init__(
        self,
        path: Path,
        slots: Sequence[int],
        *,
        dtype: str = "float32",
        expert_dtype: str = "auto",
        trunk_dtype: str = "auto",
        max_model_len: int = 128,
        kv_blocks: int | None = None,
        max_num_batched_tokens: int = 24,
        max_num_seqs: int = 8,
        block_size: int = 4,
        depth: int = 2,
        device: str = "cpu",
        transport: str = "shm",
        pinned: int | None = None,
        hosted: int = 0,
        cache_slots: int = 1,
        cache_dir: Path | None = None,
        policy: str = "lfru",
        prefix_caching: bool = True,
        kv_cache_bytes: int | None = None,
        enforce_eager: bool = False,
        plane: Callable[[WorkerSpec], Any] = DataPlane,
    ) -> None:
        """`depth`: steps in flight. `transport` of several workers: shm, or tcp, which workers of one GPU need that are
        threads of one process; or ipc, with workers of their own processes or on tests/model/fake_device.py.

        `pinned`: experts of a layer that a worker keeps in memory; `hosted`: further ones beside a GPU. The others lie
        on the disk, with their records in `cache_dir`, and memory for `cache_slots` experts of each layer is their
        cache area.
        `plane`: makes a worker; RemotePlane gives it a process of its own.
        """
        let_threads_take_turns()
        self.transport = "local" if len(slots) == 1 else transport
        self.info = opened(path).info
        members = make_workers(*slots)
        self.placement = placements.contiguous(self.info.num_layers, self.info.num_logical_experts, members)
        if device == "cuda" and kv_cache_bytes is None:
            # tests run side by side, and a worker would take most of the GPU
            kv_cache_bytes = 1 << 28
        expert_memory_bytes = None
        if pinned is not None:
            self.placement = with_pinned(self.placement, pinned, hosted)
            served = self.info.served_in(dtype, self.info.form(expert_dtype, dtype, device))
            expert_memory_bytes = (pinned + cache_slots) * self.info.num_layers * served.expert_bytes
        self.pool = ThreadPoolExecutor(len(slots))
        self.workers: dict[WorkerId, DataPlane] = {}
        for member in members:
            spec = WorkerSpec(
                worker=member.id,
                model=ModelSpec(
                    path=str(path),
                    dtype=dtype,
                    device=device,
                    max_model_len=max_model_len,
                    expert_dtype=expert_dtype,
                    trunk_dtype=trunk_dtype,
                ),
                experts=tuple(self.placement.resident(member.id, layer) for layer in range(self.info.num_layers)),
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                num_threads=1,
                expert_memory_bytes=expert_memory_bytes,
                expert_cache_dir=None if cache_dir is None else str(cache_dir),
                expert_cache_policy=policy,
                enable_prefix_caching=prefix_caching,
                steps_in_flight=depth,
                kv_cache_bytes=kv_cache_bytes,
                enforce_eager=enforce_eager,
            )
            self.workers[member.id] = plane(spec)
        # workers of other processes open the checkpoint themselves
        with mock.patch.object(loaded_model, "open_checkpoint", opened):
            blocks = dict(zip(self.workers, self.pool.map(lambda w: w.load()[0], self.workers.values()), strict=True))
        if kv_blocks is not None:
            blocks = dict.fromkeys(blocks, kv_blocks)
        self.group = f"emoe-test-{uuid.uuid4().hex[:8]}"
        self.epoch = Epoch(0)
        self.steps = 0
        self.depth = depth
        self.threads = {worker: ThreadPoolExecutor(1) for worker in self.workers}
        self.flights: deque[dict[WorkerId, Future[StepResult]]] = deque()
        self.landed: list[TokenOutput] = []
        meets = [worker.open_door("127.0.0.1") for worker in self.workers.values() if self.transport in ("tcp", "ipc")]
        self.doors = tuple(meets)
        self._flip(self.placement)
        self.scheduler = Scheduler(
            blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            eos_token_ids=self.info.eos_token_ids,
            enable_prefix_caching=prefix_caching,
            state_rooms={id_: w.state_room for id_, w in self.workers.items() if w.state_room is not None},
            window_rooms={id_: w.window_room for id_, w in self.workers.items() if w.window_room is not None},
        )

    def _flip(self, placement: Placement) -> None:
        self.epoch = Epoch(self.epoch + 1)
        spec = EpochSpec(
            epoch=self.epoch,
            placement=placement,
            group=self.group,
            transport=self.transport,
            rendezvous="",
            doors=self.doors,
        )
        list(self.pool.map(lambda w: w.prepare(spec), self.workers.values()))
        for worker in self.workers.values():
            worker.commit(self.epoch)
        self.placement = placement

    def replace(self, table: Sequence[Sequence[int]], slots: Sequence[int]) -> int:
        """Copy what a new map needs between workers, then flip. Returns the number of copies."""
        new = Placement(
            num_logical_experts=self.info.num_logical_experts,
            workers=make_workers(*slots),
            physical_to_logical_map=table,  # type: ignore[arg-type]
        )
        while self.flights:
            self.land()
        held = {worker: needs(self.placement, worker) for worker in self.workers}
        moves = plan_transfers(new, has=held, sources=held).copies
        bundles: dict[tuple[WorkerId, WorkerId], list[tuple[int, int]]] = {}
        for move in moves:
            bundles.setdefault((move.source, move.target), []).append((move.layer, move.expert))
        for (source, target), pairs in bundles.items():
            for at in range(0, len(pairs), BUNDLE):
                copies = self.workers[source].export_experts(pairs[at : at + BUNDLE], target)
                self.workers[target].import_experts(copies)
        self._flip(new)
        return len(moves)

    def placement_with(self, tiers: TierArray) -> Placement:
        """The present map with other tiers [L, S]."""
        return replace(self.placement, tiers=tiers)

    def send(self) -> None:
        """Send as many steps as may be in flight."""
        while len(self.flights) < self.depth:
            self.steps += 1
            plans = self.scheduler.schedule(self.epoch, self.steps)
            if plans is None:
                break
            self.flights.append({w: self.threads[w].submit(self.workers[w].step, p) for w, p in plans.items()})

    def step(self) -> list[TokenOutput]:
        self.send()
        if self.flights:
            self.land()
        outputs, self.landed = self.landed, []
        return outputs

    def land(self) -> None:
        flight = self.flights.popleft()
        self.landed += self.scheduler.commit({w: future.result(timeout=60) for w, future in flight.items()})

    def lose_steps(self) -> int:
        """Let the workers end all steps in flight, and drop what they have done, so that they are run again. Returns
        the number of steps."""
        lost = len(self.flights)
        for flight in self.flights:
            for future in flight.values():
                future.result(timeout=60)
        if lost:
            self.flights.clear()
            self.scheduler.rollback()
        return lost

    def run(self, requests: Sequence[GenerateRequest], *, most_steps: int = 2000) -> Mapping[str, list[int]]:
        """Add the requests and step until all have ended. Tokens by request."""
        tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
        for r in requests:
            self.scheduler.add(r)
        open_requests = set(tokens)
        while open_requests:
            most_steps -= 1
            assert most_steps, f"{open_requests} did not end"
            for output in self.step():
                assert output.offset == len(tokens[output.request_id])
                tokens[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    open_requests.discard(output.request_id)
        return tokens

    def workers_runner(self) -> ModelRunner:
        """The first worker's runner."""
        return next(iter(self.workers.values()))._runner

    def shuffled(self, shift: int) -> list[list[int]]:
        """The present map with every layer's row rotated by `shift` slots plus its number."""
        rows = self.placement.physical_to_logical_map.tolist()
        return [row[(shift + n) % len(row) :] + row[: (shift + n) % len(row)] for n, row in enumerate(rows)]
