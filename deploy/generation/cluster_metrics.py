"""Prometheus metrics of the cluster, made at each scrape of what its groups answer (metrics.py).

They have vLLM's names where vLLM has one; ours begin with `emoe:`.
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Iterable, Mapping
from itertools import accumulate
from typing import TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.cluster.errors import NotReadyError
from elastic_moe.cluster.facts.counters import BOUNDS_S, ClusterCounters, Distribution
from elastic_moe.cluster.messages.views import EngineStatus, RoutingView, ScaleView, WorkerView
from elastic_moe.deploy.backend.backend import Group

LABELS = ("model_name", "engine")
"""vLLM's labels. `engine` numbers the groups of workers, which have an engine each: what vLLM calls data parallel."""

Value = TypeVar("Value", bound=str)
"""The value of a label: a member of an enum."""

Answer = TypeVar("Answer")


async def _unless_away(question: Awaitable[Answer]) -> Answer | None:
    try:
        return await question
    except NotReadyError:
        return None


class ClusterCollector(Collector):
    """Makes metrics of the last answers of all groups."""

    def __init__(self, labels: Callable[[int], Mapping[str, str]], number: int) -> None:
        """labels: of a group, by its number. number: of groups."""
        self._labels = labels
        self.groups: list[_GroupCollector] = []
        self.expect(number)
        self.ready = False
        self.resumed = 0

    def expect(self, number: int) -> None:
        """There are so many groups now."""
        self.groups = self.groups[:number]
        self.groups += [_GroupCollector(self._labels(group)) for group in range(len(self.groups), number)]

    def collect(self) -> Iterable[Metric]:
        # of the whole server: they stand in the row of the first group
        whole = self.groups[0]
        yield whole._gauge("emoe:ready", "1 while the server serves requests.", float(self.ready))
        moved = sum(group.counters.requests_moved for group in self.groups if group.counters is not None)
        yield whole._count(
            "emoe:requests_resumed",
            "Requests that went on elsewhere because their engine or worker was lost or their worker left.",
            self.resumed + moved,
        )
        families: dict[str, Metric] = {}
        for metric in (metric for group in self.groups for metric in group.collect()):
            if metric.name in families:
                families[metric.name].samples += metric.samples
            else:
                families[metric.name] = metric
        yield from families.values()


class _GroupCollector:
    """Makes metrics of the last answers of one group."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self.engine: EngineStatus | None = None
        self.workers: list[WorkerView] | None = None
        self.scale: ScaleView | None = None
        self.routing: RoutingView | None = None
        self.counters: ClusterCounters | None = None

    async def ask(self, group: Group) -> None:
        # each by itself: while there is no engine, the coordinator still knows which workers have died
        counters: ClusterCounters | None
        self.engine, self.workers, self.scale, self.routing, counters = await asyncio.gather(
            _unless_away(group.engine.status()),
            _unless_away(group.ask(Coordinator.workers)),
            _unless_away(group.ask(Coordinator.scaling)),
            _unless_away(group.ask(Coordinator.routing)),
            _unless_away(group.ask(Coordinator.counters)),
        )
        # totals stay true; anything else that was read last would look as if it were
        self.counters = counters or self.counters

    def collect(self) -> Iterable[Metric]:
        if self.engine is not None:
            yield from self._of_engine(self.engine)
        if self.counters is not None:
            yield from self._of_coordinator(self.counters)
        if self.workers is not None:
            yield from self._of_workers(self.workers)
        if self.scale is not None:
            yield self._gauge("emoe:workers_target", "Workers that there should be.", self.scale.target)
        if self.routing is not None and self.routing.load_imbalance:
            balanced = sum(1 / ratio for ratio in self.routing.load_imbalance) / len(self.routing.load_imbalance)
            yield self._gauge(
                "emoe:balancedness",
                "Mean load of the workers over the load of the busiest one, as a mean over layers.",
                balanced,
            )

    def _of_engine(self, engine: EngineStatus) -> Iterable[Metric]:
        usage = max(engine.kv_usage.values(), default=0.0)
        running = sum(engine.running.values())
        yield self._gauge("vllm:num_requests_running", "Number of requests in model execution batches.", running)
        yield self._gauge("vllm:num_requests_waiting", "Number of requests waiting to be processed.", engine.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "KV-cache usage of the fullest worker; 1 is full.", usage)
        yield self._count("vllm:num_preemptions", "Cumulative number of preemptions.", engine.preemptions)
        yield self._count(
            "vllm:corrupted_requests",
            "Requests that ended because the model's logits were not numbers.",
            engine.corrupted_requests,
        )
        yield self._count("vllm:prefix_cache_queries", "Tokens looked up in prefix caches.", engine.prefix_queries)
        yield self._count("vllm:prefix_cache_hits", "Tokens found in prefix caches.", engine.prefix_hits)
        first = SummaryMetricFamily(
            "emoe:engine_time_to_first_token_seconds",
            "Time to first token within the engine, without HTTP and tokenizing.",
            labels=LABELS,
        )
        first.add_metric([*self._labels.values()], engine.first_tokens, engine.first_tokens_s)
        yield first
        yield self._count("emoe:steps", "Steps that all workers ran together.", engine.steps)
        yield self._gauge("emoe:epoch", "Number of the current epoch.", engine.epoch)

    def _of_coordinator(self, counters: ClusterCounters) -> Iterable[Metric]:
        yield self._count("emoe:experts_moved", "Experts copied between workers.", counters.experts_moved)
        yield self._count("emoe:bytes_moved", "Bytes of experts copied between workers.", counters.bytes_moved)
        yield self._counts("emoe:rebalance_events", "Re-placements, by result.", "result", counters.rebalances)
        yield self._durations(
            "emoe:rebalance_duration_seconds", "Time of a re-placement, by stage.", "stage", counters.rebalance_s
        )
        yield self._counts("emoe:recoveries", "Recoveries, by their cause.", "cause", counters.recoveries)
        yield self._durations(
            "emoe:recovery_duration_seconds",
            "Time of recoveries, in which no epoch served.",
            None,
            {"": counters.recovery_s},
        )
        yield from self._of_tiers(counters)

    def _of_tiers(self, counters: ClusterCounters) -> Iterable[Metric]:
        yield self._counts(
            "emoe:expert_accesses",
            "Experts that steps used, by the tier in which they lay, while some lay in another one than the device.",
            "tier",
            {tier.word: accesses for tier, accesses in counters.expert_accesses.items()},
        )
        yield self._counts(
            "emoe:expert_fetch_bytes", "Bytes of experts fetched into devices.", "from", counters.fetched_bytes
        )
        yield self._counts(
            "emoe:expert_stall_seconds", "Time that steps waited for experts, by cause.", "cause", counters.stall_s
        )

    def _of_workers(self, workers: list[WorkerView]) -> Iterable[Metric]:
        states = GaugeMetricFamily("emoe:workers", "Workers, by state.", labels=[*LABELS, "state"])
        tally = Tally({"starting": 0, "serving": 0, "draining": 0, "dead": 0, "stopped": 0})
        tally.update(worker.state for worker in workers)
        for state, count in tally.items():
            states.add_metric([*self._labels.values(), state], count)
        yield states
        resident = sum(worker.experts_resident for worker in workers if not worker.state.ended)
        yield self._gauge("emoe:experts_resident", "Experts in the devices of all workers, over all layers.", resident)
        yield self._fit(workers)

    def _fit(self, workers: list[WorkerView]) -> GaugeMetricFamily:
        """A gauge that is 1 for every path by which some worker serves a part of the model."""
        family = GaugeMetricFamily(
            "emoe:fit_info", "Which code serves which part of the model.", labels=[*LABELS, "part", "path"]
        )
        fits = [worker.fit for worker in workers if worker.fit is not None and not worker.state.ended]
        for part, path in sorted({pair for fit in fits for pair in fit.paths()}):
            family.add_metric([*self._labels.values(), part, path], 1)
        return family

    def _counts(self, name: str, text: str, label: str, counts: Mapping[Value, float]) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=[*LABELS, label])
        for value, count in counts.items():
            family.add_metric([*self._labels.values(), value], count)
        return family

    def _durations(
        self, name: str, text: str, label: str | None, durations: Mapping[Value, Distribution]
    ) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, text, labels=[*LABELS, label] if label else LABELS)
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        for value, distribution in durations.items():
            labels: list[str] = [*self._labels.values(), value] if label else [*self._labels.values()]
            buckets = list(zip(bounds, map(float, accumulate(distribution.counts)), strict=True))
            family.add_metric(labels, buckets, distribution.total_s)
        return family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric([*self._labels.values()], value)
        return family

    def _count(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric([*self._labels.values()], value)
        return family
