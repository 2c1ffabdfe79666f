"""Counts routing decisions on one worker: load per layer and expert, and transitions between adjacent layers.

All layers' choices are counted at once, after the step. A step that failed is not counted. Prefill and decode are
counted apart, with the time that steps of each kind take.

Legend: P phases (prefill, decode), T tokens, K choices, L MoE layers, E logical experts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from elastic_moe.cluster.messages.epochs import PhaseCounts, RoutingCounts


class RoutingCounter:
    """Collects counts. One thread notes the steps; another thread may call `take` at any time."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._layers = num_layers
        self._experts = num_experts
        self._step: list[Tensor] = []
        self._lock = threading.Lock()
        self._reset()

    def note(self, index_LTK: Tensor) -> None:
        """Note the choices [layers, T, K] of the step's next MoE layers."""
        self._step.append(index_LTK)

    def discard_step(self) -> None:
        self._step = []

    def commit_step(self, chunks: Sequence[int]) -> None:
        """Count the step's choices. `chunks` are the tokens of each sequence, in order; one token means decode."""
        if sum(map(len, self._step)) == self._layers and self._step[0].numel():
            self._add_step(torch.cat(self._step).to("cpu", torch.int64), chunks)
        self._step = []

    def note_time(self, seconds: float, tokens: int, *, decode: bool) -> None:
        """Note that a step of `tokens` tokens on all workers took `seconds`. `decode`: no worker ran a long prompt in
        it.
        """
        with self._lock:
            self._seconds[decode] += seconds
            self._step_tokens[decode] += tokens

    def take(self) -> RoutingCounts:
        """Return the counts since the last call, and start anew."""
        with self._lock:
            phases = [
                PhaseCounts(tokens=tokens, load=load.numpy(), steps_s=seconds, steps_tokens=step_tokens)
                for tokens, load, seconds, step_tokens in zip(
                    self._tokens, self._load_PLE, self._seconds, self._step_tokens, strict=True
                )
            ]
            transitions = self._transitions
            self._reset()
        return RoutingCounts(
            prefill=phases[0],
            decode=phases[1],
            transitions=transitions.numpy().reshape(-1, self._experts, self._experts),
        )

    def _add_step(self, index_LTK: Tensor, chunks: Sequence[int]) -> None:
        total = index_LTK.shape[1]
        assert sum(chunks) == total
        decoding = chunks.count(1)
        with self._lock:
            self._tokens[0] += total - decoding
            self._tokens[1] += decoding
            if decoding in (0, total):
                _add(self._load_PLE[int(decoding > 0)], index_LTK.flatten(1))
            else:
                decode_T = torch.tensor(chunks).eq(1).repeat_interleave(torch.tensor(chunks))
                _add(self._load_PLE[0], index_LTK[:, ~decode_T].flatten(1))
                _add(self._load_PLE[1], index_LTK[:, decode_T].flatten(1))
            if self._layers > 1:
                pairs = index_LTK[:-1, :, :, None] * self._experts + index_LTK[1:, :, None, :]
                _add(self._transitions, pairs.flatten(1))

    def _reset(self) -> None:
        self._tokens = [0, 0]
        self._seconds = [0.0, 0.0]
        self._step_tokens = [0, 0]
        self._load_PLE = [torch.zeros(self._layers, self._experts, dtype=torch.int64) for _ in range(2)]
        self._transitions = torch.zeros(max(0, self._layers - 1), self._experts**2, dtype=torch.int64)


def _add(table_LC: Tensor, index_LN: Tensor) -> None:
    """Count the indices of each row into the same row of the table."""
    ones = torch.ones((), dtype=torch.int64).expand_as(index_LN)
    table_LC.scatter_add_(1, index_LN, ones)
