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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from elastic_moe.actors.caches.kv_blocks import blocks_for
from elastic_moe.actors.caches.rows import Owner, Rows
from elastic_moe.actors.caches.running_requests import RunningRequest
from elastic_moe.actors.caches.worker_cache import WorkerCache
from elastic_moe.actors.scheduler.fair_queue import FairQueue
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
    decodes: int = 0
    """Tokens of the requests that decode; `prompts` counts those of prompts."""
    prompts: int = 0

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
        self.decodes += 1
        self._run(request, 1)

    def decode_rows(self, count: int) -> None:
        """Leave tokens for so many requests that go on by rule."""
        self.budget -= count
        self.decodes += count

    def prefill(self, request: RunningRequest) -> None:
        """Run as much of the request's prompt as there is room for."""
        length = int(min(request.remaining, self.room, self.cache.room(request)))
        if length > 0:
            self.prefill_budget -= length
            self.prompts += length
            self._run(request, length)

    def _run(self, request: RunningRequest, length: int) -> None:
        self.work.append((request, self.cache.run(request, length)))
        self.budget -= length


def admit(waiting: FairQueue, parts: Collection[Part], max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Assign waiting requests to workers, in order of their turns, while there are seats, blocks and tokens."""
    if not len(waiting):
        return
    takers = _Takers([part for part in parts if not part.cache.draining], max_num_seqs, max_num_batched_tokens)
    at = passed = 0
    while at < len(waiting) and passed <= len(parts) and takers.open.any():
        request = waiting.items[at]
        offer = takers.offer(request)
        if offer.taker is not None:
            waiting.start(request)
            takers.take(request, offer)
            continue
        request.claim = offer.claim
        if request.claim is not None:
            takers.claimed(request.claim)
            # this limit keeps making a step quick, however long the queue is
            passed += 1
        at += 1


@dataclass(slots=True, kw_only=True)
class _Offer:
    """Where a request may run."""

    taker: int | None = None
    """The number of the worker that takes it now; None if none does."""
    claim: WorkerId | None = None
    """Otherwise the worker that the request claims: the one that lacks the fewest blocks. The claim stays until the
    request runs or the worker is gone."""
    cached: list[int] = field(default_factory=list)
    """Blocks of the taker that hold the beginning of the request."""


class _Takers:
    """The workers that take requests in one step, in columns: a request is compared with all of them at once.

    Legend: W workers.
    """

    def __init__(self, parts: Sequence[Part], max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._parts = parts
        self._max_num_seqs = max_num_seqs
        self._step_tokens = max_num_batched_tokens
        self._numbers = {part.cache.worker: number for number, part in enumerate(parts)}
        self._capacity = np.array([part.cache.pool.num_blocks for part in parts], dtype=np.int64)
        self.open = np.zeros(len(parts), dtype=np.bool_)
        """[W] whether the worker has a seat and room for tokens, and is not claimed."""
        self._free = np.zeros(len(parts), dtype=np.int64)
        """[W] blocks that a new request may take."""
        self._load = np.zeros(len(parts))
        """[W] the worker's work, in tokens. A full KV cache counts as a whole step."""
        self._windows = None if not parts or parts[0].cache.windows is None else np.zeros(len(parts), dtype=np.int64)
        """[W] blocks of layers with a sliding window that a new request may take; None without such layers."""
        for number in range(len(parts)):
            self._look(number)

    def _look(self, number: int) -> None:
        part = self._parts[number]
        cache = part.cache
        self.open[number] = part.room > 0 and cache.has_seat(self._max_num_seqs)
        self._free[number] = cache.free_for_new
        if self._windows is not None and cache.windows is not None:
            self._windows[number] = cache.windows.spare
        running = RUNNING_TOKENS * len(cache.running) + self._step_tokens * cache.usage
        self._load[number] = cache.backlog + running

    def claimed(self, worker: WorkerId) -> None:
        self.open[self._numbers[worker]] = False

    def take(self, request: RunningRequest, offer: _Offer) -> None:
        assert offer.taker is not None
        self._parts[offer.taker].take(request, offer.cached)
        self._look(offer.taker)

    def offer(self, request: RunningRequest) -> _Offer:
        if not self._parts:
            return _Offer()
        block_size = self._parts[0].cache.block_size
        able = self._capacity >= blocks_for(request.longest - 1, block_size)
        slack, load = self._free - blocks_for(request.length, block_size), self._load
        cached = self._cached(request)
        if cached:
            load = load.copy()
            for number, blocks in cached.items():
                slack[number] += len(blocks) - self._parts[number].cache.pool.num_idle(blocks)
                load[number] -= len(blocks) * block_size
        windows = self._parts[0].cache.windows
        if self._windows is not None and windows is not None:
            slack = np.minimum(slack, self._windows - windows.needs(request))
        fitting = self.open & able & (slack >= 0)
        if fitting.any():
            taker = int(np.where(fitting, load, np.inf).argmin())
            return _Offer(taker=taker, cached=cached.get(taker, []))
        if not able.any():
            return _Offer()
        held = self._numbers.get(request.claim) if request.claim is not None else None
        if held is not None and able[held]:
            return _Offer(claim=request.claim)
        nearest = int(np.where(able, slack, np.iinfo(np.int64).min).argmax())
        return _Offer(claim=self._parts[nearest].cache.worker)

    def _cached(self, request: RunningRequest) -> dict[int, list[int]]:
        """By worker, the blocks that hold the beginning of the request; of those workers that have any."""
        cache = self._parts[0].cache
        count = request.cacheable(cache.block_size)
        if not count or not cache.prefix_caching:
            return {}
        (first,) = request.keys(1, cache.block_size)
        return {
            number: part.cache.cached(request) for number, part in enumerate(self._parts) if first in part.cache.pool
        }


def shortest_served(waiting: FairQueue, rows: Rows) -> RunningRequest:
    """The waiting request whose client, and then whose call, has the fewest running; of equals, the next in turn.

    Of one client's requests, those of the highest priority come first.
    Turns move on only when a request starts. While all places are taken, turns do not tell who is short of them.
    """
    firsts = waiting.firsts()
    urgent = {r.client: r.priority for r in sorted(firsts, key=lambda r: -r.priority)}
    return min(
        (r for r in firsts if r.priority == urgent[r.client]),
        key=lambda r: (rows.clients[r.client], rows.calls[r.call], r.turn, r.arrival),
    )


def in_the_way(
    request: RunningRequest, caches: Collection[WorkerCache], rows: Rows, max_num_seqs: int
) -> RunningRequest | None:
    """The running request that has to make way for `request`. None while there is room anyway.

    It is the newest of the client that has most running, if that is at least two more than the client of `request`
    has; or else, of calls of that same client, whose priority is not higher. Each preemption brings the two numbers
    closer, so requests never preempt each other in turn.
    """
    # most steps end here, without a look at every request
    if _most(rows.clients) - rows.clients[request.client] < 2 and _most(rows.calls) < 2:
        return None
    able = [cache for cache in caches if not cache.draining and cache.can_ever_hold(request)]
    if any(cache.has_seat(max_num_seqs) and cache.slack(request, cache.cached(request)) >= 0 for cache in able):
        return None
    running = [other for cache in caches for other in cache.running.items]
    greedy = _most_of(running, _client, request)
    own = [other for other in running if other.client == request.client and other.priority >= request.priority]
    greedy = greedy or _most_of(own, _call, request)
    return max((other for other in greedy if other.cache in able), key=_arrival, default=None)


def _most(counts: Counter[Owner]) -> int:
    return max(counts.values(), default=0)


def _most_of(
    running: Collection[RunningRequest], whose: Callable[[RunningRequest], Owner], request: RunningRequest
) -> list[RunningRequest]:
    """The running requests of the owner that has the most, unless the owner of `request` has nearly as many."""
    counts = Counter(map(whose, running))
    most = _most(counts)
    if most - counts[whose(request)] < 2:
        return []
    return [other for other in running if counts[whose(other)] == most]


_client = attrgetter("client")
_call = attrgetter("call")
_arrival = attrgetter("arrival")
