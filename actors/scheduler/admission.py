"""Decides which worker a waiting request runs at.

The request runs at the worker that would have the least work, in tokens: the tokens that the worker's requests and the
new request have yet to run, plus `RUNNING_TOKENS` for every request that runs there. Tokens in the worker's cache need
not be run. So a request follows its cached prefix, unless that worker has more work than the prefix saves. Without
cached prefixes, running requests and queued prompts are spread evenly, because workers run in lock-step and a step
lasts as long as its longest part.

No request starves. Clients take turns in the queue (actors/scheduler/fair_queue.py), and `in_the_way` takes a place
from a client that has at least two more running requests than the client that has the fewest. A request that fits at no
worker yet claims one: that worker accepts no later request until this one fits, and the other workers do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from elastic_moe.actors.scheduler.fair_queue import FairQueue
from elastic_moe.actors.scheduler.running_requests import RunningRequest
from elastic_moe.actors.scheduler.worker_caches import WorkerCache
from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.steps import Chunk
from elastic_moe.cluster.placement import WorkerId

RUNNING_TOKENS = 256
"""Cost of a running request's future decode steps, expressed as a number of prompt tokens."""


@dataclass(slots=True)
class Part:
    """One worker's part of a step that is being made or is in flight."""

    cache: WorkerCache
    budget: int
    """Number of tokens that the worker may still run in this step."""
    prefill_budget: int
    """How many of these tokens may be prompt tokens."""
    work: list[tuple[RunningRequest, Chunk]] = field(default_factory=list)
    forget: tuple[RequestId, ...] = ()
    prefix_queries: int = 0
    """Tokens of the requests admitted in this step; `prefix_hits` counts those that were in the cache."""
    prefix_hits: int = 0

    def take(self, request: RunningRequest, cached: list[int]) -> None:
        self.cache.take(request, cached)
        if self.cache.prefix_caching:
            self.prefix_queries += len(request.tokens)
            self.prefix_hits += request.computed
        self.prefill(request)

    @property
    def room(self) -> int:
        """Number of prompt tokens that the worker may still run in this step."""
        return min(self.budget, self.prefill_budget)

    def decode(self, request: RunningRequest) -> None:
        self._run(request, 1)

    def prefill(self, request: RunningRequest) -> None:
        """Run as much of the request's prompt as there is room for. There must be room for at least one token."""
        length = min(request.remaining, self.room)
        self.prefill_budget -= length
        self._run(request, length)

    def _run(self, request: RunningRequest, length: int) -> None:
        self.work.append((request, self.cache.run(request, length)))
        self.budget -= length


def admit(waiting: FairQueue, parts: Collection[Part], max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Assign waiting requests to workers, in order of their turns, while there are seats, blocks and tokens."""

    def load(part: Part, cached: list[int]) -> float:
        """The worker's work with the request, in tokens. A full KV cache counts as a whole step."""
        cache = part.cache
        running = RUNNING_TOKENS * len(cache.running) + max_num_batched_tokens * cache.pool.usage
        return cache.backlog + running - len(cached) * cache.block_size

    takers = {p.cache.worker: p for p in parts if not p.cache.draining}
    at = passed = 0
    while at < len(waiting) and passed <= len(parts):
        takers = {w: p for w, p in takers.items() if p.room and p.cache.has_seat(max_num_seqs)}
        if not takers:
            return
        request = waiting.items[at]
        offers = [(p, p.cache.cached(request)) for p in takers.values() if p.cache.can_ever_hold(request)]
        fitting = [(part, cached) for part, cached in offers if part.cache.slack(request, cached) >= 0]
        if fitting:
            part, cached = min(fitting, key=lambda offer: load(*offer))
            waiting.start(request)
            part.take(request, cached)
            continue
        request.claim = _claim(request, [part.cache for part in parts])
        if request.claim is not None:
            takers.pop(request.claim, None)
            # this limit keeps making a step quick, however long the queue is
            passed += 1
        at += 1


def shortest_served(waiting: FairQueue, caches: Iterable[WorkerCache]) -> RunningRequest:
    """The waiting request whose client, and then whose call, has the fewest running; of equals, the next in turn.

    Of one client's requests, those of the highest priority come first.
    Turns move on only when a request starts. While all places are taken, turns do not tell who is short of them.
    """
    running = [request for cache in caches for request in cache.running.items]
    clients, calls = Counter(map(_client, running)), Counter(map(_call, running))
    firsts = waiting.firsts()
    urgent = {r.client: r.priority for r in sorted(firsts, key=lambda r: -r.priority)}
    return min(
        (r for r in firsts if r.priority == urgent[r.client]),
        key=lambda r: (clients[r.client], calls[r.call], r.turn, r.arrival),
    )


def in_the_way(request: RunningRequest, caches: Collection[WorkerCache], max_num_seqs: int) -> RunningRequest | None:
    """The running request that has to make way for `request`. None while there is room anyway.

    It is the newest of the client that has most running, if that is at least two more than the client of `request`
    has; or else, of calls of that same client, whose priority is not higher. Each preemption brings the two numbers
    closer, so requests never preempt each other in turn.
    """
    able = [cache for cache in caches if not cache.draining and cache.can_ever_hold(request)]
    if any(cache.has_seat(max_num_seqs) and cache.slack(request, cache.cached(request)) >= 0 for cache in able):
        return None
    running = [other for cache in caches for other in cache.running.items]
    greedy = _most_of(running, _client, request)
    own = [other for other in running if other.client == request.client and other.priority >= request.priority]
    greedy = greedy or _most_of(own, _call, request)
    return max((other for other in greedy if other.cache in able), key=lambda other: other.arrival, default=None)


def _most_of(
    running: Collection[RunningRequest], whose: Callable[[RunningRequest], str], request: RunningRequest
) -> list[RunningRequest]:
    """The running requests of the owner that has the most, unless the owner of `request` has nearly as many."""
    counts = Counter(map(whose, running))
    most = max(counts.values(), default=0)
    if most - counts[whose(request)] < 2:
        return []
    return [other for other in running if counts[whose(other)] == most]


_client = attrgetter("client")
_call = attrgetter("call")


def _claim(request: RunningRequest, caches: Iterable[WorkerCache]) -> WorkerId | None:
    """The worker that the request claims: the one that lacks the fewest blocks. The claim stays until the request runs
    or the worker is gone."""
    able = [cache for cache in caches if not cache.draining and cache.can_ever_hold(request)]
    if not able:
        return None
    return next(
        (cache.worker for cache in able if cache.worker == request.claim),
        max(able, key=lambda cache: cache.slack(request, cache.cached(request))).worker,
    )
