"""What a step of a group of workers under a placement takes, and the processes of a group on this machine."""

from __future__ import annotations

import multiprocessing
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.errors import WorkerError
from elastic_moe.cluster.placement import Placement
from elastic_moe.model.measuring.process import Job, Steps, serve


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Steps under one placement."""

    steps_s: tuple[float, ...]
    """Of the slowest worker, in each step."""
    load: npt.NDArray[np.int64]
    """[L, E] tokens that chose each expert, over all workers and steps."""
    samples: npt.NDArray[np.int64]
    """[S, L, K] choices of some tokens."""


class MeasuredGroup(ABC):
    """Workers that run steps together. Use it as a context."""

    def __enter__(self) -> MeasuredGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def measure(self, placement: Placement, steps: int) -> Measured:
        """Take on a placement, and run one step unmeasured and `steps` measured ones. Raises WorkerError where a worker
        ends."""
        self._place(placement)
        self._run(1)
        seen = self._run(steps)
        return Measured(
            steps_s=tuple(max(times) for times in zip(*(one.step_s for one in seen), strict=True)),
            load=np.sum([one.load for one in seen], axis=0),
            # a worker without tokens has samples of another shape
            samples=np.concatenate([one.samples for one in seen if len(one.samples)] or [seen[0].samples]),
        )

    @abstractmethod
    def close(self) -> None:
        """End the workers."""

    @abstractmethod
    def _place(self, placement: Placement) -> None:
        """All workers take on the placement."""

    @abstractmethod
    def _run(self, steps: int) -> list[Steps]:
        """All workers run so many steps; what each saw, in rank order."""


class LocalGroup(MeasuredGroup):
    """Workers of this machine, in processes of their own."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        job = named(job)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(len(job.first.workers)):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(job, rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers()

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()

    def _place(self, placement: Placement) -> None:
        self._tell(placement)

    def _run(self, steps: int) -> list[Steps]:
        return self._tell(steps)

    def _tell(self, what: Placement | int) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(what)
        return self._answers()

    def _answers(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise WorkerError("a worker's process ended; its error stands above") from None


def named(job: Job) -> Job:
    """The job with a group's name that no other has."""
    return replace(job, group=f"{job.group}-{uuid.uuid4().hex[:8]}")
