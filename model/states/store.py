"""The states of one worker's sequences, and snapshots of states.

A step is a transaction: it may be run again, while another one that builds on it is already in flight. So a state is
never overwritten. Each step writes a sequence's states to another slot than it reads them from; a slot is free again
when a step behind it has been committed. A sequence has so many slots that this always works out.

The scheduler numbers the snapshots and decides what each holds (actors/caches/snapshots.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe.cluster.messages.epochs import StateRoom
from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.steps import Chunk
from elastic_moe.model.native.memory import untouched
from elastic_moe.model.states.finding import Kept, StateKind, StateLayer

States = dict[tuple[StateKind, int], Tensor]
"""What one layer keeps: a tensor for each kind and index. The first dimension is that of slots, or of sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMove:
    """Where a chunk's states come from, and where they go: numbers of slots."""

    source: int | None
    """None at the beginning of a sequence."""
    target: int
    snapshots: tuple[tuple[int, int], ...] = ()
    """(number of the chunk's tokens that have been run, slot) of each snapshot, in order."""


def slots_per_sequence(steps_in_flight: int) -> int:
    """States that one sequence needs: what each step in flight leaves, and what the last committed step has left."""
    return steps_in_flight + 1


class StateStore:
    """Owns the tensors and the slots of running sequences."""

    def __init__(
        self, layers: Sequence[StateLayer], room: StateRoom, *, steps_in_flight: int, device: torch.device
    ) -> None:
        running = room.seats * slots_per_sequence(steps_in_flight)
        slots = running + room.snapshots
        self.layers: list[States] = [
            {(kept.kind, kept.index): _states(slots, kept, device) for kept in layer.keeps} for layer in layers
        ]
        self.first_snapshot = running
        """The slot of snapshot 0. The others follow."""
        self._free = list(range(running - 1, -1, -1))
        self._left: dict[RequestId, dict[int, int]] = {}
        """Of every sequence: number of tokens run -> the slot that holds the states after them."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.values())

    def begin(self, chunk: Chunk) -> StateMove:
        """Choose the slots for a chunk that is about to be run, for the first time or again."""
        use = chunk.state
        assert use is not None
        left = self._left.setdefault(chunk.request_id, {})
        # states beyond `start` come from steps that did not count
        self._free_slots(left, [at for at in left if not use.keep_from <= at <= chunk.start])
        source = None
        if chunk.start:
            source = left[chunk.start] if use.restore is None else self.first_snapshot + use.restore
        target = self._free.pop()
        left[chunk.start + chunk.length] = target
        return StateMove(
            source=source,
            target=target,
            snapshots=tuple((saved.position - chunk.start, self.first_snapshot + saved.place) for saved in use.save),
        )

    def forget(self, request_id: RequestId) -> None:
        left = self._left.pop(request_id, {})
        self._free_slots(left, list(left))

    def forget_all(self) -> None:
        for request_id in list(self._left):
            self.forget(request_id)

    def _free_slots(self, left: dict[int, int], positions: Sequence[int]) -> None:
        self._free += [left.pop(at) for at in positions]


def _states(slots: int, kept: Kept, device: torch.device) -> Tensor:
    """[slots, ...] A slot is written before it is read."""
    shape = (slots, *kept.shape)
    if device.type != "cpu":
        return torch.empty(shape, dtype=kept.dtype, device=device)
    # each step reads and writes whole states, which takes longer in pages of 4 KB
    return untouched(math.prod(shape) * kept.dtype.itemsize).view(kept.dtype).view(shape)
