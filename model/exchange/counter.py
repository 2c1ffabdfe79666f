"""Counts routing decisions on one worker: exact load per layer and expert, and a sample of tokens with their choices.

All layers' choices are counted at once, after the step, on the device where they are: nothing is copied to the host
before `take`. On the CPU, some decode steps are counted together: PyTorch's operators take as long for one alone. A
step that failed is not counted. Prefill and decode are counted apart, with the time that steps of each kind take.
cluster/facts/sampling.py says how exact the sample is.

Legend: P phases (prefill, decode), T tokens, S sampled tokens, K choices, L MoE layers, E logical experts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from elastic_moe.cluster.facts.sampling import REPORT_BYTES, as_choices, most_tokens
from elastic_moe.cluster.messages.epochs import PhaseCounts, RoutingCounts
from elastic_moe.model.staging import to_device

_STEPS_TOGETHER = 32
_TOKENS_TOGETHER = 1024
"""Decode steps that are counted together have no more tokens than that."""


class Notes(Protocol):
    """Notes the choices of a step's tokens."""

    def note(self, index_LTK: Tensor) -> None:
        """Note the choices [layers, T, K] of the step's next MoE layers."""
        ...


class RecordedChoices:
    """Keeps the choices of one step."""

    def __init__(self) -> None:
        self.noted: list[Tensor] = []
        """[layers, T, K] each."""

    def note(self, index_LTK: Tensor) -> None:
        self.noted.append(index_LTK)


class RoutingCounter:
    """Collects counts. One thread notes the steps; another thread may call `take` at any time."""

    def __init__(self, num_layers: int, num_experts: int, *, rng: np.random.Generator | None = None) -> None:
        """`rng` draws the sample; seeded with 0 if not given."""
        self._layers = num_layers
        self._experts = num_experts
        self._step: list[Tensor] = []
        self._waiting: list[list[Tensor]] = []
        """Choices of decode steps that have been committed and are not counted yet."""
        self._waiting_tokens = 0
        self._lock = threading.Lock()
        self._rng = rng or np.random.default_rng(0)
        self._rate = 1.0
        """The probability with which a token is in the sample."""
        self._load_PLE: Tensor | None = None
        self._sample: list[Tensor] = []
        """[S, L, K] each."""
        self._sampled = 0
        self._reset()

    def note(self, index_LTK: Tensor) -> None:
        """Note the choices [layers, T, K] of the step's next MoE layers."""
        self._step.append(index_LTK)

    def discard_step(self) -> None:
        self._step = []

    def commit_step(self, chunks: Sequence[int]) -> None:
        """Count the step's choices. `chunks` are the tokens of each sequence, in order; one token means decode."""
        step, self._step = self._step, []
        if sum(map(len, step)) != self._layers or not step[0].numel():
            return
        with self._lock:
            # recorded steps write their choices to the same memory each time
            if step[0].device.type == "cpu" and chunks.count(1) == len(chunks):
                self._waiting.append(step)
                self._waiting_tokens += len(chunks)
                if len(self._waiting) >= _STEPS_TOGETHER or self._waiting_tokens >= _TOKENS_TOGETHER:
                    self._count_waiting()
            else:
                self._add_step(_joined(step), chunks)

    def _count_waiting(self) -> None:
        if self._waiting:
            steps, tokens = self._waiting, self._waiting_tokens
            self._waiting, self._waiting_tokens = [], 0
            self._add_step(torch.cat(list(map(_joined, steps)), 1), [1] * tokens)

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
            self._count_waiting()
            tokens, seconds, step_tokens = self._tokens, self._seconds, self._step_tokens
            load_PLE, sample = self._load_PLE, self._sample
            # a time like the last one needs this rate; if it has fewer tokens, the next one gets more of them
            self._rate = min(1.0, 2 * self._rate)
            self._reset()
        loads = np.zeros((2, self._layers, self._experts), np.int64) if load_PLE is None else load_PLE.cpu().numpy()
        phases = [
            PhaseCounts(tokens=tokens[p], load=loads[p], steps_s=seconds[p], steps_tokens=step_tokens[p])
            for p in range(2)
        ]
        choices = torch.cat(sample).cpu().numpy() if sample else np.zeros((0, self._layers, 1), np.uint8)
        return RoutingCounts(prefill=phases[0], decode=phases[1], sample=as_choices(choices, self._experts))

    def _add_step(self, index_LTK: Tensor, chunks: Sequence[int]) -> None:
        total = index_LTK.shape[1]
        assert sum(chunks) == total
        if self._load_PLE is None:
            shape = (2, self._layers, self._experts)
            self._load_PLE = torch.zeros(shape, dtype=torch.int64, device=index_LTK.device)
        decoding = chunks.count(1)
        self._tokens[0] += total - decoding
        self._tokens[1] += decoding
        if decoding in (0, total):
            _add(self._load_PLE[int(decoding > 0)], index_LTK)
        else:
            lengths = np.asarray(chunks)
            places = (np.cumsum(lengths) - 1)[lengths == 1]
            decode_LTK = index_LTK[:, to_device([places], index_LTK.device)[0]]
            _add(self._load_PLE[0], index_LTK)
            _add(self._load_PLE[0], decode_LTK, -1)
            _add(self._load_PLE[1], decode_LTK)
        self._add_sample(index_LTK)

    def _add_sample(self, index_LTK: Tensor) -> None:
        chosen = np.flatnonzero(self._rng.random(index_LTK.shape[1]) < self._rate)
        if not len(chosen):
            return
        small = torch.uint8 if self._experts <= 256 else torch.int16
        device = index_LTK.device
        self._sample.append(index_LTK[:, to_device([chosen], device)[0]].transpose(0, 1).to(small))
        self._sampled += len(chosen)
        size_bytes = REPORT_BYTES // small.itemsize
        while self._sampled > most_tokens(size_bytes, (self._layers, index_LTK.shape[2])):
            kept = np.flatnonzero(self._rng.random(self._sampled) < 0.5)
            self._sample = [torch.cat(self._sample)[to_device([kept], device)[0]]]
            self._sampled, self._rate = len(kept), self._rate / 2

    def _reset(self) -> None:
        self._tokens = [0, 0]
        self._seconds = [0.0, 0.0]
        self._step_tokens = [0, 0]
        self._load_PLE, self._sample, self._sampled = None, [], 0


def _joined(step: Sequence[Tensor]) -> Tensor:
    """[L, T, K] of the choices of some layers each."""
    return step[0] if len(step) == 1 else torch.cat(list(step))


def _add(table_LE: Tensor, index_LTK: Tensor, change: int = 1) -> None:
    """Count the indices of each layer into the same row of the table."""
    index_LN = index_LTK.flatten(1).long()
    changes = torch.full((), change, dtype=torch.int64, device=table_LE.device).expand_as(index_LN)
    table_LE.scatter_add_(1, index_LN, changes)
