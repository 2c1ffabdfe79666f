"""Records what a step launches as CUDA graphs, in pieces: between two graphs runs what no graph can hold.

An exchange with other workers is launched anew in every step, and so is attention of prompts, whose kernels take the
lengths of sequences as numbers. Such work is given to `outside`. It writes into tensors that were made before, since
the graph that follows reads the same memory in every replay. It takes them by `borrowed` (foreign_memory.py), since the
memory of the graphs serves the next layer as soon as nothing else refers to it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

R = TypeVar("R")

Work = Callable[[], None]

SIZES = (
    *(1, 2, 4),
    *range(8, 65, 8),
    *range(80, 257, 16),
    *range(320, 513, 64),
    *range(640, 1025, 128),
    *range(1280, 2049, 256),
)
"""The numbers of rows that steps are padded to. In a larger step the GPU is busy while the CPU launches its kernels."""


def padded(rows: int) -> int:
    """To how many rows so many are padded. Beyond the largest of SIZES none are added."""
    at = bisect_left(SIZES, rows)
    return SIZES[at] if at < len(SIZES) else rows


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphTerms:
    """What a worker's recording of a step must keep to."""

    rows: int | None
    """The rows that its tokens are padded to; None if it may choose."""
    memory: list[object]
    """What the experts' side of the recording reads. The recording is right as long as all are the same objects."""


class Outside(Protocol):
    """What keeps the work between graphs while a step is recorded."""

    def outside(self, work: Work) -> None:
        """Run the work at this place in every replay. It is not run now."""
        ...


_recording: ContextVar[Outside | None] = ContextVar("recording", default=None)


def recording() -> Outside | None:
    """What records the step that this thread runs; None if it is not recorded."""
    return _recording.get()


@contextmanager
def recorded_by(outside: Outside) -> Iterator[None]:
    """While the block runs, this thread's step is recorded."""
    token = _recording.set(outside)
    try:
        yield
    finally:
        _recording.reset(token)


class Recorder(Protocol):
    """Records functions, so that they can be replayed."""

    def record(self, run: Callable[[], R]) -> tuple[Work, R]:
        """Returns what replays `run`, and its result, whose tensors every replay writes again.

        Raises RuntimeError if there is no memory, or if `run` makes the CPU wait for the device.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs. All share one pool of memory, so the next replay may overwrite the last one's tensors."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._side: torch.cuda.Stream | None = None
        """What is recorded runs on it. Memory of the pool is used again on the same stream only."""

    def record(self, run: Callable[[], R]) -> tuple[Work, R]:
        if self._side is None:
            self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        pieces, side = _Pieces(self._pool), self._side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), recorded_by(pieces):
            # kernels are compiled and libraries find their memory before
            run()
            side.synchronize()
            pieces.begin()
            try:
                result = run()
            finally:
                pieces.end()
        torch.cuda.current_stream().wait_stream(side)
        return pieces.replay, result


class _Pieces:
    """The graphs of one recording, and the work between them, in order."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._pieces: list[Work] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        """The one that is being captured."""

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # other threads copy experts meanwhile
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            graph.capture_end()
            self._pieces.append(graph.replay)

    def outside(self, work: Work) -> None:
        if self._graph is not None:
            self.end()
            self._pieces.append(work)
            self.begin()

    def replay(self) -> None:
        for piece in self._pieces:
            piece()
