"""The recordings of a worker's steps, and the memory in which they find a step.

Legend: V vocabulary, L MoE layers, T tokens of a step, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from elastic_moe.cluster.errors import EmoeError
from elastic_moe.model.graph_pieces import Recorder, Work
from elastic_moe.model.staging import recorded

R = TypeVar("R")


class RecordingFailed(EmoeError):
    """A graph could not be recorded, for lack of memory for example."""


Launch = Callable[[], tuple[Tensor, Tensor]]
"""Runs a step that has been recorded: (logits [n, V] of the sequences that want them, chosen experts [L, T, K] of its
tokens). They are valid until the next step."""


class Recordings(Generic[R]):
    """The recordings of steps of all sizes, as long as they are right."""

    def __init__(self, recorder: Recorder, *, prepare: Callable[[int], None], run: Callable[[int], R]) -> None:
        """`run` runs a step of so many rows. `prepare` writes what such a step reads while it is recorded."""
        self._recorder = recorder
        self._prepare = prepare
        self._run = run
        self._made: dict[int, tuple[Work, R]] = {}
        self._memory: list[object] = []

    def record_all(self, sizes: Sequence[int], memory: list[object]) -> None:
        """Record steps of these sizes, which ascend. The largest is first, since the others then use its memory.

        Raises RecordingFailed.
        """
        for rows in reversed(sizes):
            self.get(rows, memory)

    def get(self, rows: int, memory: list[object]) -> tuple[Work, R]:
        """What replays a step of so many rows, and what it writes. `memory` as in GraphTerms: recordings of other
        memory are dropped. Raises RecordingFailed."""
        if len(memory) != len(self._memory) or any(
            new is not old for new, old in zip(memory, self._memory, strict=True)
        ):
            self._made.clear()
            self._memory = memory
        if rows not in self._made:
            self._prepare(rows)
            try:
                self._made[rows] = self._recorder.record(lambda: self._run(rows))
            except RuntimeError as error:
                raise RecordingFailed(str(error).splitlines()[0]) from error
        return self._made[rows]


class FixedInputs:
    """What recordings read, in memory of the device that stays in place, and where the host writes it."""

    def __init__(self, size: int, device: torch.device) -> None:
        """`size`: numbers of 64 bits."""
        self.device = torch.zeros(size, dtype=torch.int64, device=device)
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None
        """When the device has the last step, whose place in the host's memory is free then."""

    def begin(self) -> Tensor:
        """Where the host writes the next step."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host

    def send(self, used: int) -> None:
        """Copy the first numbers to the device. The CPU does not wait."""
        self.device[:used].copy_(self._host[:used], non_blocking=True)
        if self.device.is_cuda:
            self._copied = recorded()
