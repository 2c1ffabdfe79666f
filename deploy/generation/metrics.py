"""Prometheus metrics. They have vLLM's names where vLLM has one, so that its dashboards work; ours begin with `emoe:`.

Events of this replica are counted here, and added to those of the others (counts.py); figures of the cluster are read
from it at each scrape.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from ray.exceptions import RayError

from elastic_moe.actors.remote.key_value import KeyValue
from elastic_moe.actors.telemetry.exporting import Exporter
from elastic_moe.cluster.messages.requests import FinishReason
from elastic_moe.deploy.backend.backend import Backend, Requests
from elastic_moe.deploy.generation.cluster_metrics import LABELS, ClusterCollector
from elastic_moe.deploy.generation.counts import AddedUp, Counts, SharedCounts, counts_of
from elastic_moe.deploy.generation.life import Life, Times
from elastic_moe.deploy.generation.token_counts import TokenCounts

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

RESUMED = "resumed"
"""The key of a replica's number of resumed requests among its counts."""
SHARE_S = 2.0
"""Seconds between two times at which a replica shows its counts to the others; what it counts after the last of them
is lost if it dies."""

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
TOKEN_BUCKETS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
TIME_HISTOGRAMS = {
    "queue": "Time from the request's arrival to its first step.",
    "prefill": "Time from the request's first step to its first token.",
    "decode": "Time from the request's first token to its last one.",
    "inference": "Time from the request's first step to its last token.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTotals:
    """Tokens that this replica sent, and the sums of the waits for them."""

    first_tokens: int = 0
    first_tokens_s: float = 0.0
    next_tokens: int = 0
    next_tokens_s: float = 0.0


class _Engine:
    """What this replica counts of the requests of one group."""

    def __init__(self, families: Mapping[str, Counter | Histogram], labels: Mapping[str, str]) -> None:
        self.labels = labels
        self._children = {name: family.labels(**labels) for name, family in families.items()}

    def add(self, name: str, count: int) -> None:
        counter = self._children[name]
        assert isinstance(counter, Counter)
        counter.inc(count)

    def observe(self, name: str, value: float) -> None:
        histogram = self._children[name]
        assert isinstance(histogram, Histogram)
        histogram.observe(value)


class Metrics:
    def __init__(self, model_name: str, values: KeyValue, *, log_requests: bool = False, engines: int = 1) -> None:
        """`values` is what all replicas share. log_requests: write a line for each request that has ended. engines:
        number of groups."""
        self.exporter: Exporter | None = None
        """Takes a trace of each request, where there is one."""
        self._log_requests = log_requests
        self._model_name = model_name
        self._first_tokens = 0
        self._first_tokens_s = 0.0
        self._registry = CollectorRegistry()
        """What this replica has counted."""
        self._added_up = AddedUp(self._registry)
        self._shared = SharedCounts(values, uuid.uuid4().hex)
        self._cluster = ClusterCollector(self._labels, engines)
        self._whole = CollectorRegistry()
        self._whole.register(self._cluster)
        self._whole.register(self._added_up)
        families: dict[str, Counter | Histogram] = {
            "prompt_tokens": self._counter("vllm:prompt_tokens", "Number of prefill tokens processed."),
            "ttft": self._histogram("vllm:time_to_first_token_seconds", "Time to first token.", TTFT_BUCKETS),
            "e2e": self._histogram("vllm:e2e_request_latency_seconds", "Time of a whole request.", LATENCY_BUCKETS),
            "prompt_size": self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKEN_BUCKETS),
            "answer_size": self._histogram("vllm:request_generation_tokens", "Tokens of an answer.", TOKEN_BUCKETS),
            "most_tokens": self._histogram(
                "vllm:request_params_max_tokens", "The max_tokens of a request.", TOKEN_BUCKETS
            ),
            "token_time": self._histogram(
                "vllm:request_time_per_output_token_seconds", "Mean time between the tokens of a request.", ITL_BUCKETS
            ),
            **{
                name: self._histogram(f"vllm:request_{name}_time_seconds", text, LATENCY_BUCKETS)
                for name, text in TIME_HISTOGRAMS.items()
            },
        }
        self._success = Counter(
            "vllm:request_success",
            "Count of processed requests, by the reason that ended them.",
            (*LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._families = families
        self._engines: list[_Engine] = []
        self.tokens = TokenCounts(ITL_BUCKETS)
        self._registry.register(self.tokens)
        self._expect(engines)

    def _labels(self, engine: int) -> Mapping[str, str]:
        return {"model_name": self._model_name, "engine": str(engine)}

    def _expect(self, engines: int) -> None:
        """There are so many groups now. What was counted of earlier ones stays."""
        for number in range(len(self._engines), engines):
            of = self._labels(number)
            self._engines.append(_Engine(self._families, of))
            self.tokens.add_group(of)
            for reason in FinishReason:
                self._success.labels(**of, finished_reason=reason.value)

    def request_began(self, prompt_tokens: int, engine: int = 0) -> None:
        """`engine`: number of the group that runs the request, here and below."""
        self._expect(engine + 1)
        self._engines[engine].add("prompt_tokens", prompt_tokens)

    def tokens_came(self, count: int, elapsed_s: float, engine: int = 0, *, first: bool) -> None:
        """Count tokens that came `elapsed_s` after the previous ones, or after the request began."""
        if count < 1:
            return
        self._expect(engine + 1)
        if first:
            self.tokens.first(count, engine)
            self._engines[engine].observe("ttft", elapsed_s)
            self._first_tokens += 1
            self._first_tokens_s += elapsed_s
            return
        self.tokens.next(count, elapsed_s / count, engine)

    @property
    def latency(self) -> LatencyTotals:
        return LatencyTotals(
            first_tokens=self._first_tokens,
            first_tokens_s=self._first_tokens_s,
            next_tokens=self.tokens.num_next,
            next_tokens_s=self.tokens.next_s,
        )

    def request_ended(self, life: Life, reason: FinishReason, engine: int = 0) -> None:
        """Count a request that has ended, and report it: as a trace and as a line, where these are asked for."""
        self._expect(engine + 1)
        times, of = life.times(), self._engines[engine]
        self._success.labels(**of.labels, finished_reason=reason.value).inc()
        of.observe("e2e", times.whole_s)
        of.observe("prompt_size", len(life.request.prompt_token_ids))
        of.observe("answer_size", life.tokens)
        of.observe("most_tokens", life.request.params.max_tokens)
        for name, seconds in _stages(times).items():
            if seconds is not None:
                of.observe(name, seconds)
        if times.decode_s is not None and life.tokens > 1:
            of.observe("token_time", times.decode_s / (life.tokens - 1))
        life.report(times, reason, self.exporter, log=self._log_requests)

    async def scrape(self, backend: Backend) -> bytes:
        """The text that Prometheus reads. Cluster metrics are left out while there is no cluster to ask."""
        cluster = self._cluster
        cluster.ready = (await backend.readiness()).ready
        await self._add_up(backend.engine.resumed)
        number = backend.num_groups
        cluster.expect(number)
        self._expect(number)
        groups = zip(cluster.groups, map(backend.group, range(number)), strict=True)
        await asyncio.gather(*(collector.ask(group) for collector, group in groups))
        return prometheus_client.generate_latest(self._whole)

    async def share(self, engine: Requests) -> None:
        """Put this replica's counts where the others see them, again and again. Never returns."""
        while True:
            await asyncio.sleep(SHARE_S)
            with contextlib.suppress(RayError):
                await asyncio.to_thread(self._shared.put, self._counts(engine.resumed))

    async def _add_up(self, resumed: int) -> None:
        counts = self._counts(resumed)

        def exchange() -> Counts:
            self._shared.put(counts)
            return self._shared.others()

        with contextlib.suppress(RayError):  # then the last sums stay
            self._added_up.others = await asyncio.to_thread(exchange)
        self._cluster.resumed = resumed + int(self._added_up.others.get(RESUMED, 0))

    def _counts(self, resumed: int) -> Counts:
        counts = counts_of(self._registry.collect())
        return {**counts, RESUMED: float(resumed)} if resumed else counts

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, LABELS, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, LABELS, registry=self._registry, buckets=buckets)


def _stages(times: Times) -> dict[str, float | None]:
    """By the names of TIME_HISTOGRAMS."""
    computed = None if times.queued_s is None or times.last_s is None else times.last_s - times.queued_s
    return {
        "queue": times.queued_s,
        "prefill": times.prefill_s,
        "decode": times.decode_s,
        "inference": computed,
    }
