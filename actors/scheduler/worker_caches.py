"""What the scheduler knows of one worker: its KV-cache blocks, its requests, and the requests it must still forget.

Prefix caching: a request begins with the longest known prefix of its tokens. It shares the blocks of that prefix and
never writes to them. Its own full blocks become known when the step that computed them is committed, and not before,
because a step in flight may fail halfway. The last token is always computed, because its logits are needed. A worker
that ends takes its cached blocks with it.

In a model with a state per sequence, a request can begin only where there is also a snapshot of the states
(actors/scheduler/snapshots.py). Snapshots are taken after three blocks: the last full one of a prompt; the one up to
which a prompt's keys are cached further than its states, since other prompts share that beginning; and the last full
one of an answer, where the next turn of a conversation goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

from elastic_moe.actors.scheduler.kv_blocks import BlockPool, blocks_for
from elastic_moe.actors.scheduler.running_requests import OrderedRequests, RunningRequest
from elastic_moe.actors.scheduler.snapshots import SnapshotPool
from elastic_moe.cluster.messages.epochs import StateRoom
from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.steps import Chunk, SavedState, StateUse
from elastic_moe.cluster.placement import WorkerId


class WorkerCache:
    """One worker's KV blocks, the requests that run there, and the ended requests that it must still forget."""

    __slots__ = (
        "backlog",
        "block_size",
        "draining",
        "forget",
        "pool",
        "prefix_caching",
        "running",
        "snapshots",
        "state_room",
        "worker",
    )

    def __init__(
        self,
        worker: WorkerId,
        num_kv_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        state_room: StateRoom | None = None,
    ) -> None:
        """`state_room`: None if the model keeps nothing but keys and values."""
        self.worker = worker
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(num_kv_blocks)
        self.state_room = state_room
        self.snapshots = SnapshotPool(0 if state_room is None else state_room.snapshots)
        self.running = OrderedRequests(attrgetter("arrival"))
        self.backlog = 0
        """Sum of `remaining` over the running requests, in tokens."""
        self.forget: list[RequestId] = []
        """Requests that have left the worker, and that no committed plan has named for it to forget."""
        self.draining = False

    @property
    def seats(self) -> float:
        """Most requests whose states the worker has memory for."""
        return math.inf if self.state_room is None else self.state_room.seats

    def has_seat(self, max_num_seqs: int) -> bool:
        return len(self.running) < min(max_num_seqs, self.seats)

    @property
    def decoding(self) -> bool:
        """Whether a request here is past its prompt and its last token is not in flight yet."""
        return any(request.remaining == 1 and not request.exhausted for request in self.running.items)

    def can_ever_hold(self, request: RunningRequest) -> bool:
        """Whether the empty cache has room for the request at its longest. The last token is never run."""
        return blocks_for(request.longest - 1, self.block_size) <= self.pool.num_blocks

    def cached(self, request: RunningRequest) -> list[int]:
        """Blocks of the longest prefix of the request's tokens that this worker has cached."""
        if not self.prefix_caching:
            return []
        keys = request.keys(request.cacheable(self.block_size), self.block_size)
        found = self.pool.find(keys)
        return found if self.state_room is None else found[: self.snapshots.longest(keys[: len(found)])]

    def slack(self, request: RunningRequest, cached: Sequence[int]) -> int:
        """Blocks left over if the request ran here and shared `cached`; negative if it does not fit now.

        Some blocks stay reserved for running requests to grow; otherwise the new request would soon be preempted.
        """
        headroom = min(len(self.running), self.pool.num_blocks // 32)
        free = self.pool.num_free - self.pool.num_idle(cached)
        return free - headroom - blocks_for(len(request.tokens), self.block_size) + len(cached)

    def take(self, request: RunningRequest, cached: Sequence[int]) -> None:
        """Run the request here, with blocks for all its tokens: a prefill that has begun never waits for memory."""
        assert request.cache is None
        request.cache = self
        request.claim = None
        self.pool.hold(cached)
        own = blocks_for(len(request.tokens), self.block_size) - len(cached)
        request.blocks = [*cached, *self.pool.allocate(own)]
        request.computed = len(cached) * self.block_size
        if request.cached_tokens is None:
            request.cached_tokens = min(request.computed, request.num_prompt_tokens)
        else:
            request.resumptions += 1
        if self.state_room is not None and self.prefix_caching:
            self._choose_snapshots(request, len(cached))
        self.running.add(request)
        self.backlog += request.remaining

    def _choose_snapshots(self, request: RunningRequest, cached: int) -> None:
        """Note where the request's states come from, and after which blocks of its known tokens they are kept."""
        keys = request.keys((len(request.tokens) - 1) // self.block_size, self.block_size)
        if cached:
            request.restore = self.snapshots.pin(keys[cached - 1])
        shared = len(self.pool.find(keys))
        request.borders = sorted(border for border in {shared, len(keys)} if border > cached)

    def run(self, request: RunningRequest, length: int) -> Chunk:
        """Put the request's next `length` tokens into flight."""
        before = request.remaining
        chunk = request.run(length, None if self.state_room is None else self._use_states(request, length))
        self.backlog += request.remaining - before
        return chunk

    def _use_states(self, request: RunningRequest, length: int) -> StateUse:
        begin, end = request.started, request.started + length
        borders = [border for border in request.borders if begin < border * self.block_size <= end]
        if self.prefix_caching and length == 1 and begin >= request.num_prompt_tokens and not end % self.block_size:
            borders = [end // self.block_size]
        places = [(border * self.block_size, self.snapshots.write()) for border in borders]
        return StateUse(
            keep_from=request.computed,
            restore=None if request.flight else request.restore,
            save=tuple(SavedState(position=p, place=place) for p, place in places if place is not None),
        )

    def rollback(self, request: RunningRequest) -> None:
        """Drop the request's tokens in flight, so that they are run again."""
        before = request.remaining
        self._clear_flight(request)
        self.backlog += request.remaining - before

    def _clear_flight(self, request: RunningRequest) -> None:
        for chunk in request.flight:
            for saved in _saved(chunk):
                self.snapshots.give_back(saved.place)
        request.flight = []

    def commit_but_last(self, request: RunningRequest) -> bool:
        """Record the request's oldest chunk but for its last token, which has to run again, since no token was sampled
        after it. What was scheduled after it has run with a wrong token.

        Returns False if the whole chunk has to run again: a state cannot be set back by one token.
        """
        before = request.remaining
        landed = self.state_room is None or request.flight[0].length == 1
        if landed:
            self._land(request, short=1)
        self._clear_flight(request)
        self.backlog += request.remaining - before
        return landed

    def commit(self, request: RunningRequest) -> None:
        """Record that the request's oldest chunk is in the KV cache for good. Blocks that are full now become known."""
        self._land(request)

    def _land(self, request: RunningRequest, *, short: int = 0) -> None:
        first = request.computed // self.block_size
        chunk = request.flight[0]
        request.land(short=short)
        full = request.computed // self.block_size
        if self.prefix_caching and full > first:
            for number, key in enumerate(request.keys(full, self.block_size)[first:], first):
                self.pool.publish(request.blocks[number], key)
        self._unpin(request)
        for saved in _saved(chunk):
            self._land_state(request, saved)

    def _land_state(self, request: RunningRequest, saved: SavedState) -> None:
        if saved.position > request.computed:
            self.snapshots.give_back(saved.place)
            return
        border = saved.position // self.block_size
        key = request.keys(border, self.block_size)[-1]
        if self.snapshots.publish(saved.place, key) and border not in request.borders:
            # an answer leaves one snapshot, at its last block
            if request.tail is not None:
                self.snapshots.retire(request.tail)
            request.tail = key

    def _unpin(self, request: RunningRequest) -> None:
        if request.restore is not None:
            self.snapshots.unpin(request.restore)
            request.restore = None

    def unshare(self, request: RunningRequest) -> None:
        """Make sure that no other request uses what this one has computed."""
        self.pool.forget(request.blocks)
        for key in request.keys(request.computed // self.block_size, self.block_size):
            self.snapshots.retire(key)

    def drop(self, request: RunningRequest) -> None:
        """Take the request and its blocks off this worker. The request keeps its tokens and loses what it computed.

        Another request may get the blocks at once, although a step in flight still writes to them: the worker runs
        that step before any later one, and a block becomes known only through what is written later.
        """
        assert request.cache is self
        self.running.remove(request)
        self.backlog -= request.remaining
        self.pool.free(request.blocks)
        self.forget.append(request.request_id)
        self._clear_flight(request)
        self._unpin(request)
        request.cache = None
        request.borders, request.tail = [], None
        request.blocks = []
        request.computed = request.introduced_blocks = 0
        request.introduced = False

    def validate(self) -> None:
        """Asserts the invariants of this worker and of what runs on it."""
        items = self.running.items
        arrivals = [request.arrival for request in items]
        assert arrivals == sorted(set(arrivals)), "running sequences are out of order"
        self.pool.validate(block for request in items for block in request.blocks)
        assert self.backlog == sum(request.remaining for request in items)
        self.snapshots.validate(
            pinned=[request.restore for request in items if request.restore is not None],
            writing=[saved.place for request in items for chunk in request.flight for saved in _saved(chunk)],
        )
        for request in items:
            known = len(request.tokens)
            assert request.cache is self
            assert not request.ended
            assert 0 <= request.computed < known
            assert request.computed <= request.started < request.known
            assert request.introduced or request.introduced_blocks == 0
            assert 0 <= request.introduced_blocks <= len(request.blocks)
            # The newest token gets its place only when it is scheduled, and keeps it when its step is rolled back.
            assert blocks_for(known - 1, self.block_size) <= len(request.blocks)
            assert len(request.blocks) <= blocks_for(request.longest - 1, self.block_size)
            assert blocks_for(request.started, self.block_size) <= len(request.blocks)


def _saved(chunk: Chunk) -> tuple[SavedState, ...]:
    return () if chunk.state is None else chunk.state.save
