"""One worker: it loads, takes on the placements that it is told, and runs steps; and the process of one.

The parent sends a placement, or a number of steps, or None for the end; each of the first two is answered.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, ModelSpec, TransportKind, WorkerSpec
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.placement import Placement
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.measuring.prompts import BLOCK, PROMPT, Prompts
from elastic_moe.model.worker.data_plane import DataPlane


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a group is to run."""

    path: str
    """Directory of the checkpoint."""
    dtype: str
    expert_dtype: str
    trunk_dtype: str
    first: Placement
    group: str
    tokens: int
    """Of a step of all workers."""

    @property
    def transport(self) -> TransportKind:
        """How the workers of the first placement, and of all others, exchange tokens."""
        if len(self.first.workers) == 1:
            return TransportKind.LOCAL
        return TransportKind.SHM if len({one.node for one in self.first.workers}) == 1 else TransportKind.TCP


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What some steps showed on one worker."""

    step_s: tuple[float, ...]
    load: npt.NDArray[np.int64]
    """[L, E] tokens of this worker that chose each expert, over all the steps."""
    samples: npt.NDArray[np.int64]
    """[S, L, K] choices of some of them."""


class Member:
    """The worker of this process. Its threads are those that this process may use, shared by the workers of its
    node."""

    def __init__(self, job: Job, rank: int) -> None:
        self._job, self._epoch = job, 0
        info, size = open_checkpoint(job.path).info, len(job.first.workers)
        own = -(-job.tokens // size)
        worker = job.first.workers[rank].id
        threads = len(os.sched_getaffinity(0))
        beside = sum(one.node == job.first.workers[rank].node for one in job.first.workers)
        self._plane = DataPlane(
            WorkerSpec(
                worker=worker,
                model=ModelSpec(
                    path=job.path,
                    dtype=job.dtype,
                    device="cpu",
                    max_model_len=PROMPT,
                    expert_dtype=job.expert_dtype,
                    trunk_dtype=job.trunk_dtype,
                ),
                experts=tuple(job.first.experts_of(worker, layer) for layer in range(info.num_layers)),
                kv_cache_bytes=1 << 30,
                block_size=BLOCK,
                max_num_seqs=2 * -(-own // PROMPT),
                max_num_batched_tokens=max(own, PROMPT),
                num_threads=max(1, threads // beside),
                node_threads=threads,
                node_workers=beside,
            )
        )
        self._plane.load()
        self._prompts = Prompts(job.tokens, rank, size, info.vocab_size, self._plane.window_room)

    def open_door(self, address: str) -> Endpoint:
        """Where this worker waits for the others of several nodes. `address` is this node's. Raises OSError."""
        return self._plane.open_door(address)

    def place(self, placement: Placement, doors: tuple[Endpoint, ...] = ()) -> None:
        """Take on a placement; what is not held is read from the checkpoint. `doors`: of all workers, for the first
        placement of workers of several nodes."""
        self._epoch += 1
        held, worker = self._plane.held(), self._plane.spec.worker
        wanted = [placement.experts_of(worker, layer) for layer in range(placement.num_layers)]
        lacking = [(layer, e) for layer, experts in enumerate(wanted) for e in set(experts) - {-1, *held[layer]}]
        if lacking:
            self._plane.read_experts(sorted(lacking))
        spec = EpochSpec(
            epoch=Epoch(self._epoch),
            placement=placement,
            group=self._job.group,
            transport=self._job.transport,
            rendezvous="",
            doors=doors,
        )
        self._plane.prepare(spec)
        self._plane.commit(spec.epoch)

    def run(self, number: int) -> Steps:
        """Run steps. The first one after a change of the placement belongs to no measurement."""
        self._plane.routing_counts()
        times = []
        for _ in range(number):
            plan = self._prompts.next(Epoch(self._epoch))
            begin = time.perf_counter()
            self._plane.step(plan)
            times.append(time.perf_counter() - begin)
        counts = self._plane.routing_counts()
        return Steps(step_s=tuple(times), load=counts.load, samples=counts.sample.astype(np.int64))


def serve(job: Job, rank: int, pipe: Connection) -> None:
    """The process. Errors end it, which the parent sees as the end of the pipe."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    member = Member(job, rank)
    member.place(job.first)
    pipe.send(None)
    while (told := pipe.recv()) is not None:
        if isinstance(told, Placement):
            member.place(told)
            pipe.send(None)
        else:
            pipe.send(member.run(told))
