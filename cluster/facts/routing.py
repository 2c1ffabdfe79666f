"""Routing statistics: tokens per layer and expert over a sliding window, and how uneven they make the load.

Legend: L MoE layers, E logical experts, W workers, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.facts.sampling import PART_BYTES, REPORT_BYTES, RoutingSample, SampledTokens, most_tokens
from elastic_moe.cluster.messages.epochs import NodeReport, PhaseCounts, RoutingCounts
from elastic_moe.cluster.placement import EMPTY, Placement

IntCounts = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MAX_DECODE_WEIGHT = 32.0
"""Upper limit of `decode_weight`."""


def joined(first: NodeReport, second: NodeReport, rng: np.random.Generator) -> NodeReport:
    """The reports of different workers as one, which is no larger than each may be. `rng` thins samples."""
    counts = (first.counts, second.counts)
    sample = SampledTokens(first.counts.load.shape[1], most_tokens(REPORT_BYTES, first.counts.sample.shape[1:]), rng)
    for one in counts:
        sample.add(one.sample, one.tokens)
    choices = sample.choices()
    return NodeReport(
        counts=RoutingCounts(
            prefill=counts[0].prefill + counts[1].prefill,
            decode=counts[0].decode + counts[1].decode,
            sample=first.counts.sample if choices is None else choices,
        ),
        tiers={**first.tiers, **second.tiers},
        link_gbps={**first.link_gbps, **second.link_gbps},
    )


@dataclass(slots=True)
class _Bucket:
    """Sums of one part of the window."""

    number: int
    prefill: PhaseCounts
    decode: PhaseCounts
    sample: SampledTokens


class RoutingWindow:
    """Sums of the workers' reports over the last `window_s` seconds.

    The window is cut into `buckets` parts, and each keeps one sum. So memory does not grow with the number of reports,
    and the window's beginning moves in steps of window_s / buckets. Adding a report takes microseconds: transitions are
    only counted when a planner asks for them, from a sample of the tokens.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        window_s: float,
        buckets: int = 6,
        rng: np.random.Generator | None = None,
    ) -> None:
        """`rng` thins samples; seeded with 0 if not given."""
        assert window_s > 0
        assert buckets >= 1
        self.window_s = window_s
        self._shape = (num_layers, num_experts)
        self._bucket_s = window_s / buckets
        self._count = buckets
        self.taken = np.zeros(self._shape, dtype=np.int64)
        """[L, E] tokens that chose each expert in all reports that the window has ever taken."""
        self.reports = 0
        """Number of reports that the window has taken, of one node each."""
        self._buckets: list[_Bucket] = []
        self._rng = rng or np.random.default_rng(0)

    def add(self, counts: RoutingCounts, now: float) -> None:
        """Add a report, which counts what workers ran since their previous reports."""
        assert counts.load.shape == self._shape, f"load is {counts.load.shape}, expected {self._shape}"
        self._drop_old(now)
        self.reports += 1
        if counts.tokens == 0:
            return
        self.taken += counts.load
        bucket = self._bucket_of(now, counts.sample.shape[1:])
        bucket.prefill += counts.prefill
        bucket.decode += counts.decode
        bucket.sample.add(counts.sample, counts.tokens)

    def begin_with(self, load: IntCounts, top_k: int, now: float) -> None:
        """Begin again with nothing but these tokens [L, E], whose own choices are not known, of decode steps."""
        sample = [bucket.sample.choices() for bucket in self._buckets[-1:]]
        self._buckets = []
        if sample and sample[0] is not None and load.any():
            tokens = max(1, int(load.sum(axis=1).max()) // top_k)
            self._bucket_of(now, sample[0].shape[1:]).decode += PhaseCounts(tokens=tokens, load=load)

    def tokens(self, now: float) -> int:
        return sum(phase.tokens for phase in self.phases(now))

    def load(self, now: float) -> IntCounts:
        """[L, E] tokens that chose each expert."""
        prefill, decode = self.phases(now)
        return prefill.load + decode.load

    def load_parts(self, now: float) -> IntCounts:
        """[P, L, E] tokens that chose each expert, in each part of the window that has any, the oldest first."""
        self._drop_old(now)
        parts = [bucket.prefill.load + bucket.decode.load for bucket in self._buckets]
        return np.array(parts, dtype=np.int64).reshape(-1, *self._shape)

    def closed(self, after: int, now: float) -> list[tuple[int, IntCounts]]:
        """(number, [L, E] tokens that chose each expert) of the parts of the window that are over, and whose number is
        above `after`, the oldest first."""
        self._drop_old(now)
        current = int(now // self._bucket_s)
        return [
            (bucket.number, bucket.prefill.load + bucket.decode.load)
            for bucket in self._buckets
            if after < bucket.number < current
        ]

    def phases(self, now: float) -> tuple[PhaseCounts, PhaseCounts]:
        """The sums over the window: of prefill steps, and of decode steps."""
        self._drop_old(now)
        nothing = PhaseCounts(tokens=0, load=np.zeros(self._shape, dtype=np.int64))
        prefill = sum((bucket.prefill for bucket in self._buckets), nothing)
        return prefill, sum((bucket.decode for bucket in self._buckets), nothing)

    def sample(self, now: float) -> RoutingSample:
        """A sample of the window's tokens."""
        self._drop_old(now)
        layers, experts = self._shape
        parts = [(bucket.sample.choices(), bucket.sample.tokens) for bucket in self._buckets]
        return RoutingSample(
            num_layers=layers,
            num_experts=experts,
            parts=tuple((choices, tokens) for choices, tokens in parts if choices is not None and len(choices)),
        )

    def _bucket_of(self, now: float, choices: tuple[int, ...]) -> _Bucket:
        number = int(now // self._bucket_s)
        if not self._buckets or self._buckets[-1].number < number:
            nothing = PhaseCounts(tokens=0, load=np.zeros(self._shape, dtype=np.int64))
            sample = SampledTokens(self._shape[1], most_tokens(PART_BYTES, choices), self._rng)
            self._buckets.append(_Bucket(number, nothing, nothing, sample))
        return self._buckets[-1]

    def _drop_old(self, now: float) -> None:
        oldest = int(now // self._bucket_s) - self._count + 1
        self._buckets = [bucket for bucket in self._buckets if bucket.number >= oldest]


def decode_weight(prefill: PhaseCounts, decode: PhaseCounts) -> float:
    """Time of a token in a decode step, relative to that of a token in a prefill step, as measured.

    A decode step reads an expert's weights for a few tokens, a prefill step for hundreds. The weight is 1.0 if the
    window lacks one kind of step. It is kept within 1 and MAX_DECODE_WEIGHT, since a few steps are a poor measure.
    """
    if not (prefill.steps_tokens and decode.steps_tokens and prefill.steps_s > 0):
        return 1.0
    ratio = (decode.steps_s / decode.steps_tokens) / (prefill.steps_s / prefill.steps_tokens)
    return min(max(ratio, 1.0), MAX_DECODE_WEIGHT)


def weighted_load(prefill: PhaseCounts, decode: PhaseCounts) -> FloatArray:
    """[L, E] tokens that chose each expert, weighted by their time, and scaled so that the sum stays the same."""
    weight = decode_weight(prefill, decode)
    weighted = prefill.load + weight * decode.load
    total = weighted.sum()
    return weighted * ((prefill.load.sum() + decode.load.sum()) / total if total else 1.0)


def load_per_worker(load: IntCounts, placement: Placement) -> FloatArray:
    """[L, W] tokens that each worker computes; the replicas of an expert share its tokens evenly."""
    table = placement.physical_to_logical_map
    rows = np.arange(table.shape[0])[:, None]
    filled = table != EMPTY
    replicas = np.zeros(load.shape, dtype=np.int64)
    np.add.at(replicas, (np.broadcast_to(rows, table.shape)[filled], table[filled]), 1)
    share = load / np.maximum(replicas, 1)
    per_slot = np.where(filled, share[rows, np.where(filled, table, 0)], 0.0)
    return np.add.reduceat(per_slot, placement.first_slot, axis=1)


def load_imbalance(load: IntCounts, placement: Placement) -> FloatArray:
    """[L] the busiest worker's load over the mean; 1.0 where nothing was counted."""
    per_worker = load_per_worker(load, placement)
    mean = per_worker.mean(axis=1)
    return np.where(mean > 0, per_worker.max(axis=1) / np.where(mean > 0, mean, 1.0), 1.0)
