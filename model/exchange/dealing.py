"""Deals the experts of a step that lie in no worker's memory: each is fetched by the worker that has it soonest.

In a dense step every worker gets the choices of all tokens. With its tokens each one sends a *word* on what it has in
memory. So all workers come to the same deal, and no message is needed for it (optimizer/buffering/dealing.py).

Legend: L MoE layers, E logical experts, W workers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elastic_moe.cluster.placement import EMPTY, Placement, Tier
from elastic_moe.optimizer.buffering.dealing import deal

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

_RATE_BYTES = 4
_ALIKE = 2.0
"""Disks whose times differ by less are taken for equal: the times of a few reads differ by chance."""
_MOST_APART = 4.0
"""So many times as long as the fastest disk takes, at most, is what a slow one is thought to take."""
NOBODY = -1
"""Marks the experts that are computed where the placement says."""


class Memory(Protocol):
    """What a worker tells the others of itself. The thread that runs the steps calls it."""

    @property
    def fetch_s(self) -> float:
        """Seconds in which it reads an expert from its disk; 0 while it does not know."""
        ...

    def in_memory(self, layer: int) -> Collection[int]:
        """The experts that it can compute at once."""
        ...


class Dealer:
    """The deals of one epoch on one worker."""

    def __init__(self, placement: Placement, homes_LE: IntArray, memory: Memory) -> None:
        """homes_LE: the rank that serves each expert by the placement, the same on all workers."""
        self._memory = memory
        self._homes_LE = homes_LE
        self._loose_LE = loose_experts(placement)
        # the others have no cache area that an expert could pass through
        outside = (placement.tiers != Tier.DEVICE).any(axis=0)
        self._fetches_W = [bool(outside[placement.slot_to_worker == r].any()) for r in range(len(placement.workers))]

    def word(self, layer: int) -> Tensor:
        """What this worker sends with its tokens: uint8, `word_bytes` long."""
        present = np.zeros(self._homes_LE.shape[1], dtype=bool)
        present[list(self._memory.in_memory(layer))] = True
        rate = np.array([self._memory.fetch_s], dtype=np.float32).view(np.uint8)
        return torch.from_numpy(np.concatenate([rate, np.packbits(present)]))

    def ranks(self, layer: int, words: Sequence[Tensor], index_RK: Tensor) -> IntArray:
        """[E] the rank that computes each expert for all tokens, or NOBODY where the placement decides.

        words: those of all workers. index_RK: the choices of all tokens of the step.
        """
        chosen = np.full(self._homes_LE.shape[1], NOBODY, dtype=np.int64)
        tokens_E = np.bincount(index_RK.numpy().ravel(), minlength=len(chosen))
        experts = np.flatnonzero((tokens_E > 0) & self._loose_LE[layer])
        if not len(experts):
            return chosen
        bytes_WB = torch.stack(list(words)).numpy()
        present_WE = np.unpackbits(bytes_WB[:, _RATE_BYTES:], axis=1, count=len(chosen)).astype(bool)
        homes = self._homes_LE[layer]
        at_home = present_WE[homes[experts], experts]
        chosen[experts] = np.where(at_home, homes[experts], present_WE[:, experts].argmax(axis=0))
        missing = experts[~present_WE[:, experts].any(axis=0)]
        missing = missing[np.argsort(-tokens_E[missing], kind="stable")]
        chosen[missing] = deal(missing.tolist(), homes.tolist(), self._fetch_s(bytes_WB))
        return chosen

    def _fetch_s(self, bytes_WB: npt.NDArray[np.uint8]) -> list[float]:
        said_W = np.ascontiguousarray(bytes_WB[:, :_RATE_BYTES]).view(np.float32)[:, 0].astype(np.float64)
        least = min(said_W[said_W > 0], default=1.0)
        # a disk that was slow for a while would otherwise not be asked again, and never be known to be fast
        seconds = np.where(said_W < least * _ALIKE, least, np.minimum(said_W, least * _MOST_APART))
        fetches: list[float] = np.where(self._fetches_W, seconds, np.inf).tolist()
        return fetches


def word_bytes(num_experts: int) -> int:
    """The length of a word."""
    return _RATE_BYTES + -(-num_experts // 8)


def loose_experts(placement: Placement) -> BoolArray:
    """[L, E] the experts that the placement puts into no worker's memory."""
    loose = np.ones((placement.num_layers, placement.num_logical_experts), dtype=bool)
    table = placement.physical_to_logical_map
    layer, slot = np.nonzero((table != EMPTY) & (placement.tiers != Tier.DISK))
    loose[layer, table[layer, slot]] = False
    return loose
