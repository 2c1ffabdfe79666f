"""Counts of routing decisions on one worker: load per layer and expert, and transitions between adjacent layers.

Counting waits until the step is over, when all layers' choices are counted at once; a step that failed counts nothing.

Legend: T tokens, K choices, L MoE layers, E logical experts.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from cluster.protocol import RoutingCounts


class RoutingCounter:
    """Steps are noted by one thread; `take` may be called from another at any time."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._layers = num_layers
        self._experts = num_experts
        self._step: list[Tensor] = []
        self._lock = threading.Lock()
        self._reset()

    def note(self, index_TK: Tensor) -> None:
        """The choices of the step's next MoE layer."""
        self._step.append(index_TK)

    def discard_step(self) -> None:
        self._step = []

    def commit_step(self) -> None:
        """The step's choices count."""
        if len(self._step) == self._layers and self._step[0].numel():
            self._add_step(torch.stack(self._step).to("cpu", torch.int64))
        self._step = []

    def take(self) -> RoutingCounts:
        """Counts since the last call."""
        with self._lock:
            tokens, load, transitions = self._tokens, self._load, self._transitions
            self._reset()
        return RoutingCounts(
            tokens=tokens,
            load=load.numpy(),
            transitions=transitions.numpy().reshape(-1, self._experts, self._experts),
        )

    def _add_step(self, index_LTK: Tensor) -> None:
        with self._lock:
            self._tokens += index_LTK.shape[1]
            _add(self._load, index_LTK.flatten(1))
            if self._layers > 1:
                pairs = index_LTK[:-1, :, :, None] * self._experts + index_LTK[1:, :, None, :]
                _add(self._transitions, pairs.flatten(1))

    def _reset(self) -> None:
        self._tokens = 0
        self._load = torch.zeros(self._layers, self._experts, dtype=torch.int64)
        self._transitions = torch.zeros(max(0, self._layers - 1), self._experts**2, dtype=torch.int64)


def _add(table_LC: Tensor, index_LN: Tensor) -> None:
    """Count the indices of each row into the same row of the table."""
    ones = torch.ones((), dtype=torch.int64).expand_as(index_LN)
    table_LC.scatter_add_(1, index_LN, ones)
