"""What is counted of every token: their number, and the time between two of them.

prometheus_client's own counters take a lock and a walk over the buckets for each token, which would be more than the
rest of what a streamed token costs here. All on one event loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class TokenCounts(Collector):
    """Tokens and intervals of each group, under vLLM's names."""

    def __init__(self, bounds_s: Sequence[float]) -> None:
        """`bounds_s`: upper bounds of the histogram's buckets, ascending."""
        self._labels: list[Mapping[str, str]] = []
        self._bounds_s = bounds_s
        self._first: list[int] = []
        self._intervals: list[list[int]] = []
        """By group and bucket."""
        self._sums_s: list[float] = []

    def add_group(self, labels: Mapping[str, str]) -> None:
        self._labels.append(labels)
        self._first.append(0)
        self._intervals.append([0] * (len(self._bounds_s) + 1))
        self._sums_s.append(0.0)

    def first(self, count: int, group: int) -> None:
        """Count the first tokens of an answer, which have no interval before them."""
        self._first[group] += count

    @property
    def num_next(self) -> int:
        """Number of tokens that had an interval before them. The next property is the sum of the intervals."""
        return sum(map(sum, self._intervals))

    @property
    def next_s(self) -> float:
        return sum(self._sums_s)

    def next(self, count: int, interval_s: float, group: int) -> None:
        """Count tokens that came `interval_s` after one another."""
        self._intervals[group][bisect_left(self._bounds_s, interval_s)] += count
        self._sums_s[group] += count * interval_s

    def collect(self) -> Iterable[Metric]:
        names = tuple(self._labels[0]) if self._labels else ()
        tokens = CounterMetricFamily("vllm:generation_tokens", "Number of generation tokens processed.", labels=names)
        intervals = HistogramMetricFamily("vllm:inter_token_latency_seconds", "Time between tokens.", labels=names)
        ends = [*(str(float(bound)) for bound in self._bounds_s), "+Inf"]
        for group, labels in enumerate(self._labels):
            values = tuple(labels.values())
            tokens.add_metric(values, self._first[group] + sum(self._intervals[group]))
            buckets = list(zip(ends, map(float, accumulate(self._intervals[group])), strict=True))
            intervals.add_metric(values, buckets, self._sums_s[group])
        yield tokens
        yield intervals
