"""The processes of one group of workers, and what a step under a placement takes."""

from __future__ import annotations

import multiprocessing
import uuid
from collections.abc import Sequence
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


class MeasuredGroup:
    """Workers of this machine in processes of their own. Use it as a context; raises WorkerError where one ends."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        job = replace(job, group=f"{job.group}-{uuid.uuid4().hex[:8]}")
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

    def __enter__(self) -> MeasuredGroup:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()

    def measure(self, placement: Placement, steps: int) -> Measured:
        """Take on a placement, and run one step unmeasured and `steps` measured ones."""
        self._tell(placement)
        self._tell(1)
        seen: Sequence[Steps] = self._tell(steps)
        return Measured(
            steps_s=tuple(max(times) for times in zip(*(one.step_s for one in seen), strict=True)),
            load=np.sum([one.load for one in seen], axis=0),
            # a worker without tokens has samples of another shape
            samples=np.concatenate([one.samples for one in seen if len(one.samples)] or [seen[0].samples]),
        )

    def _tell(self, what: Placement | int) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(what)
        return self._answers()

    def _answers(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise WorkerError("a worker's process ended; its error stands above") from None
