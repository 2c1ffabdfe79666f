"""Which waiting request gets which home worker.

It goes where the least work would be queued, in tokens: those that its home's requests and it itself have yet to run,
plus `RUNNING_TOKENS` for every request that runs there. What a home has in its cache need not be run. So a request
follows its cached prefix, unless that home has more queued than the prefix saves, or one more request running for every
`RUNNING_TOKENS` tokens that it saves. With nothing cached, running requests and queued prompts are spread evenly:
workers are in lock-step, and a step lasts as long as its longest part.

No request starves: clients take turns in the queue (actors/scheduler/fair_queue.py), and `in_the_way` takes a place
from a client that has two more running than the one that has fewest. One that does not fit anywhere yet claims a
worker, which then takes no later one until it fits, while later ones may go to the other workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from elastic_moe.actors.scheduler.fair_queue import FairQueue
from elastic_moe.actors.scheduler.homes import Home
from elastic_moe.actors.scheduler.sequences import Sequence
from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.steps import Chunk
from elastic_moe.cluster.placement import WorkerId

RUNNING_TOKENS = 256
"""A request's future tokens, in the time of prompt tokens: it will hold up its worker in every step to come."""


@dataclass(slots=True)
class Part:
    """One worker's part of the step being made or in flight."""

    home: Home
    budget: int
    """Tokens that it may still run."""
    prefill_budget: int
    """How many of them may be of prompts."""
    work: list[tuple[Sequence, Chunk]] = field(default_factory=list)
    forget: tuple[RequestId, ...] = ()
    prefix_queries: int = 0
    """Tokens of the requests that came here now, and (below) those that were in the cache."""
    prefix_hits: int = 0

    def take(self, sequence: Sequence, cached: list[int]) -> None:
        self.home.take(sequence, cached)
        if self.home.prefix_caching:
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.computed
        self.prefill(sequence)

    @property
    def room(self) -> int:
        """Prompt tokens that it may still run."""
        return min(self.budget, self.prefill_budget)

    def decode(self, sequence: Sequence) -> None:
        self._run(sequence, 1)

    def prefill(self, sequence: Sequence) -> None:
        """As much of its prompt as there is room for, which must be some."""
        length = min(sequence.remaining, self.room)
        self.prefill_budget -= length
        self._run(sequence, length)

    def _run(self, sequence: Sequence, length: int) -> None:
        self.work.append((sequence, self.home.run(sequence, length)))
        self.budget -= length


def admit(waiting: FairQueue, parts: Collection[Part], max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Give waiting requests a home, in order of their turns, while there are seats, blocks and tokens to run."""

    def load(part: Part, cached: list[int]) -> float:
        """Tokens in all if the request came here. A full KV cache is worth a step: there it may be preempted."""
        home = part.home
        running = RUNNING_TOKENS * len(home.running) + max_num_batched_tokens * home.pool.usage
        return home.backlog + running - len(cached) * home.block_size

    takers = {p.home.worker: p for p in parts if not p.home.draining}
    at = passed = 0
    while at < len(waiting) and passed <= len(parts):
        takers = {w: p for w, p in takers.items() if p.room and len(p.home.running) < max_num_seqs}
        if not takers:
            return
        sequence = waiting.items[at]
        offers = [(p, p.home.cached(sequence)) for p in takers.values() if p.home.can_ever_hold(sequence)]
        fitting = [(part, cached) for part, cached in offers if part.home.slack(sequence, cached) >= 0]
        if fitting:
            part, cached = min(fitting, key=lambda offer: load(*offer))
            waiting.start(sequence)
            part.take(sequence, cached)
            continue
        sequence.claim = _claim(sequence, [part.home for part in parts])
        if sequence.claim is not None:
            takers.pop(sequence.claim, None)
            # Looking only so far ahead keeps a step quick however long the queue is.
            passed += 1
        at += 1


def shortest_served(waiting: FairQueue, homes: Iterable[Home]) -> Sequence:
    """The waiting sequence whose client, and then whose call, has fewest running; of equal ones the next in turn.

    Turns move on only when a sequence starts. Where all places are taken for long, they do not tell who is short.
    """
    running = [sequence for home in homes for sequence in home.running.items]
    clients, calls = Counter(map(_client, running)), Counter(map(_call, running))
    return min(waiting.firsts(), key=lambda s: (clients[s.client], calls[s.call], s.turn, s.arrival))


def in_the_way(sequence: Sequence, homes: Collection[Home], max_num_seqs: int) -> Sequence | None:
    """The running sequence that has to make way for `sequence`, whose turn it is. None while there is room anyway.

    It is the newest of the client that has most running, if that is at least two more than the client of `sequence`
    has; or else, of calls of that same client. Each time the two come closer, so it never goes to and fro.
    """
    able = [home for home in homes if not home.draining and home.can_ever_hold(sequence)]
    if any(len(home.running) < max_num_seqs and home.slack(sequence, home.cached(sequence)) >= 0 for home in able):
        return None
    running = [other for home in homes for other in home.running.items]
    greedy = _most_of(running, _client, sequence)
    greedy = greedy or _most_of([other for other in running if other.client == sequence.client], _call, sequence)
    return max((other for other in greedy if other.home in able), key=lambda other: other.arrival, default=None)


def _most_of(running: Collection[Sequence], whose: Callable[[Sequence], str], sequence: Sequence) -> list[Sequence]:
    """All of whoever has most of `running`, unless `sequence` belongs to one who has nearly as many."""
    counts = Counter(map(whose, running))
    most = max(counts.values(), default=0)
    if most - counts[whose(sequence)] < 2:
        return []
    return [other for other in running if counts[whose(other)] == most]


_client = attrgetter("client")
_call = attrgetter("call")


def _claim(sequence: Sequence, homes: Iterable[Home]) -> WorkerId | None:
    """The worker that waits for it: where most is missing least. It stays the same until it runs or the worker goes."""
    able = [home for home in homes if not home.draining and home.can_ever_hold(sequence)]
    if not able:
        return None
    return next(
        (home.worker for home in able if home.worker == sequence.claim),
        max(able, key=lambda home: home.slack(sequence, home.cached(sequence))).worker,
    )
