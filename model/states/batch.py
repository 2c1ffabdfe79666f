"""What the layers that keep states need to know of a step: which tokens belong to which sequence, and the slots of
their states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elastic_moe.model.staging import to_device
from elastic_moe.model.states.block import Segments
from elastic_moe.model.states.store import StateMove, StateStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A sequence that has several tokens in this step, or its first one."""

    begin: int
    end: int
    move: StateMove


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodes:
    """The sequences that go on with one token each."""

    rows: Tensor
    """[R] index of each token in the step."""
    sources: Tensor
    """[R] slots."""
    targets: Tensor
    """[R] slots."""
    snapshots: tuple[tuple[int, int], ...]
    """(slot of the sequence's new states, slot of a snapshot of them)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBatch:
    """What the layers that keep states need to know of a step."""

    store: StateStore
    decodes: Decodes | None
    pieces: tuple[Piece, ...]
    segments: Segments
    """The same as decodes and pieces, for native calls."""

    @classmethod
    def build(cls, chunks: Sequence[tuple[int, StateMove]], store: StateStore, device: torch.device) -> StateBatch:
        """`chunks`: the length of each packed chunk, and the move of its states."""
        decodes: list[tuple[int, StateMove]] = []
        pieces: list[Piece] = []
        row = 0
        for length, move in chunks:
            if length == 1 and move.source is not None:
                decodes.append((row, move))
            else:
                pieces.append(Piece(begin=row, end=row + length, move=move))
            row += length
        return cls(
            store=store,
            decodes=_decodes(decodes, device) if decodes else None,
            pieces=tuple(pieces),
            segments=_segments(chunks),
        )


def _decodes(items: Sequence[tuple[int, StateMove]], device: torch.device) -> Decodes:
    numbers = np.array([(row, move.source, move.target) for row, move in items], dtype=np.int64)
    rows, sources, targets = to_device(list(numbers.T), device)
    snapshots = tuple((move.target, slot) for _, move in items for _, slot in move.snapshots)
    return Decodes(rows=rows, sources=sources, targets=targets, snapshots=snapshots)


def _segments(chunks: Sequence[tuple[int, StateMove]]) -> Segments:
    rows, sources, targets = [0], [], []
    row = 0
    for length, move in chunks:
        source = -1 if move.source is None else move.source
        # a state is a snapshot first, from which the rest of the chunk goes on, which may have no tokens
        for tokens, slot in (*move.snapshots, (length, move.target)):
            rows.append(row + tokens)
            sources.append(source)
            targets.append(slot)
            source = slot
        row += length
    return Segments(rows=torch.tensor(rows), sources=torch.tensor(sources), targets=torch.tensor(targets))


_current: ContextVar[StateBatch | None] = ContextVar("state_batch", default=None)


@contextmanager
def states_of(batch: StateBatch | None) -> Iterator[None]:
    """While the block runs, layers that keep states belong to `batch`."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


def current_states() -> StateBatch | None:
    """The batch that layers with states belong to now."""
    return _current.get()
