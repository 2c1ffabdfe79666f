"""Counts of all API replicas together: each puts its own into the store that they share, and whoever is asked adds up.

A replica that has died counts on with what it has put there last. A sum never becomes smaller, whichever replica says
it: before it answers, a replica puts its own counts where the others will find them.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Mapping

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from elastic_moe.actors.remote.key_value import KeyValue

PREFIX = "counts/"
COUNTED = ("counter", "histogram", "summary")
"""Kinds of metrics that are added up."""

Counts = Mapping[str, float]


def counts_of(metrics: Iterable[Metric]) -> dict[str, float]:
    """Every count that is not 0, by its sample's name and labels."""
    counted = (metric for metric in metrics if metric.type in COUNTED)
    samples = (sample for metric in counted for sample in metric.samples if not sample.name.endswith("_created"))
    return {_key(sample): sample.value for sample in samples if sample.value}


class SharedCounts:
    """The counts of one replica and those of the others. Methods block for calls to the store."""

    def __init__(self, values: KeyValue, name: str) -> None:
        self._values = values
        self._name = name
        self._put: Counts = {}

    def put(self, counts: Counts) -> None:
        """Put the counts of this replica where the others see them. One that has counted nothing leaves no trace."""
        if counts and counts != self._put:
            self._values.put(PREFIX + self._name, msgspec.msgpack.encode(counts))
            self._put = counts

    def others(self) -> Counts:
        """The sums of the counts of all other replicas."""
        total: Tally[str] = Tally()
        for key in self._values.keys(PREFIX):
            if key != PREFIX + self._name and (data := self._values.get(key)) is not None:
                total.update(msgspec.msgpack.decode(data, type=dict[str, float]))
        return total


class AddedUp(Collector):
    """The metrics of `own`, with the counts of the other replicas on top."""

    def __init__(self, own: CollectorRegistry) -> None:
        self._own = own
        self.others: Counts = {}

    def collect(self) -> Iterable[Metric]:
        for metric in self._own.collect():
            if metric.type in COUNTED:
                metric.samples = [
                    sample._replace(value=sample.value + self.others.get(_key(sample), 0.0))
                    for sample in metric.samples
                ]
            yield metric


def _key(sample: Sample) -> str:
    return ",".join([sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))])
