"""A sample of tokens with the experts that they chose, from which transitions between layers are estimated.

Every token that a worker ran is in the sample with the same probability. So a share p of the tokens is estimated with
a standard error of sqrt(p (1 - p) / S) for S tokens in the sample. S is bounded by bytes: for 58 layers with 8 choices
of 256 experts there are up to 282 tokens in a report, and 2,259 in each part of a window.

Legend: S tokens of the sample, L MoE layers, K choices, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Choices = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
"""[S, L, K] logical experts."""
FloatArray = npt.NDArray[np.float64]

REPORT_BYTES = 1 << 17
"""Most bytes of a sample in one report of a worker."""
PART_BYTES = 1 << 20
"""Most bytes of a sample that one part of a window keeps."""


def most_tokens(size_bytes: int, shape: tuple[int, ...]) -> int:
    """How many tokens of choices [L, K] `size_bytes` hold, at least one."""
    return max(1, size_bytes // max(1, int(np.prod(shape))))


def as_choices(numbers: npt.NDArray[Any], num_experts: int) -> Choices:
    """The numbers of experts in the smallest type that has room for all."""
    if num_experts <= 256:
        return numbers.astype(np.uint8, copy=False)
    return numbers.astype(np.uint16, copy=False)


class SampledTokens:
    """A sample of all tokens that were added, each with the probability `rate`. It never grows past `most` tokens."""

    def __init__(self, num_experts: int, most: int, rng: np.random.Generator) -> None:
        self._num_experts = num_experts
        self._most = most
        self._rng = rng
        self._pieces: list[Choices] = []
        self.tokens = 0
        """Tokens that the sample stands for."""
        self.rate = 1.0

    @property
    def size(self) -> int:
        return sum(map(len, self._pieces))

    def add(self, choices: Choices, tokens: int) -> None:
        """Add a sample [S, L, K] of `tokens` tokens, in which each was with the same probability."""
        if not tokens:
            return
        rate = len(choices) / tokens
        if rate > self.rate:
            choices = self._thinned(choices, self.rate / rate)
        elif len(choices):
            self._thin(rate)
        self._pieces.append(choices)
        self.tokens += tokens
        while self.size > self._most:
            self._thin(self.rate / 2)

    def _thin(self, rate: float) -> None:
        kept = rate / self.rate
        self._pieces = [self._thinned(piece, kept) for piece in self._pieces]
        self.rate = rate

    def _thinned(self, choices: Choices, share: float) -> Choices:
        return choices[self._rng.random(len(choices)) < share]

    def choices(self) -> Choices | None:
        """[S, L, K]; None if nothing was added."""
        return as_choices(np.concatenate(self._pieces), self._num_experts) if self._pieces else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSample:
    """Samples of several parts of a window, and the tokens that each stands for. Nothing in it changes."""

    num_layers: int
    num_experts: int
    parts: tuple[tuple[Choices, int], ...]

    def runs(self, length: int) -> FloatArray:
        """[Q, L, E] tokens that chose each expert, in runs of `length` tokens of the sample. Their order is the one in
        which a worker ran them, so that a run is of one prompt, or of the few requests that it decoded together."""
        experts, layers = self.num_experts, self.num_layers
        counts = [np.zeros((0, layers, experts))]
        offsets = np.arange(layers, dtype=np.int64)[:, None] * experts
        for choices, _ in self.parts:
            number = len(choices) // length
            if number == 0:
                continue
            of_run = (choices[: number * length].astype(np.int64) + offsets).reshape(number, -1)
            of_run += np.arange(number)[:, None] * (layers * experts)
            flat = np.bincount(of_run.ravel(), minlength=number * layers * experts)
            counts.append(flat.reshape(number, layers, experts).astype(np.float64))
        return np.concatenate(counts)

    def transitions(self) -> FloatArray:
        """[L-1, E, E] estimated number of tokens that chose e in layer l and f in layer l + 1.

        It takes some 5 ns for each of S (L-1) K^2 pairs, so call it outside event loops.
        """
        experts = self.num_experts
        total = np.zeros((max(0, self.num_layers - 1), experts * experts))
        for choices, tokens in self.parts:
            for layer, row in enumerate(total):
                before, after = choices[:, layer, :, None].astype(np.int32), choices[:, layer + 1, None, :]
                pairs = np.bincount((before * experts + after).ravel(), minlength=experts * experts)
                row += pairs * (tokens / len(choices))
        return total.reshape(-1, experts, experts)
