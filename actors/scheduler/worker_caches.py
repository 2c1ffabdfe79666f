"""What the scheduler knows of one worker: its KV-cache blocks, its requests, and the requests it must still forget.

Prefix caching: a request begins with the longest known prefix of its tokens. It shares the blocks of that prefix and
never writes to them. Its own full blocks become known when the step that computed them is committed, and not before,
because a step in flight may fail halfway; those of tokens that it generates by rule become known when it leaves the
worker. The last token is always computed, because its logits are needed. A worker
that ends takes its cached blocks with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from elastic_moe.actors.scheduler.kv_blocks import BlockPool, blocks_for
from elastic_moe.actors.scheduler.rows import Rows
from elastic_moe.actors.scheduler.running_requests import OrderedRequests, RunningRequest
from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.steps import Chunk
from elastic_moe.cluster.placement import WorkerId


class WorkerCache:
    """One worker's KV blocks, the requests that run there, and the ended requests that it must still forget."""

    __slots__ = (
        "_free_rows",
        "backlog",
        "base",
        "block_size",
        "draining",
        "forget",
        "max_num_seqs",
        "pool",
        "prefix_caching",
        "rows",
        "running",
        "unsteady",
        "worker",
    )

    def __init__(
        self, worker: WorkerId, num_kv_blocks: int, rows: Rows, *, max_num_seqs: int, prefix_caching: bool = True
    ) -> None:
        """`rows` is shared by all workers. At most `max_num_seqs` requests run here."""
        self.worker = worker
        self.block_size = rows.block_size
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(num_kv_blocks)
        self.rows = rows
        self.max_num_seqs = max_num_seqs
        self.base = rows.take_range(max_num_seqs)
        """The first row of this worker's requests. A request's seat is its row's number from there on."""
        self._free_rows = list(range(self.base + max_num_seqs - 1, self.base - 1, -1))
        self.running = OrderedRequests(attrgetter("arrival"))
        self.unsteady: set[RunningRequest] = set()
        """The running requests that do not go on by rule."""
        self.backlog = 0
        """Sum of `remaining` over the running requests, in tokens."""
        self.forget: list[RequestId] = []
        """Requests that have left the worker, and that no committed plan has named for it to forget."""
        self.draining = False

    def close(self) -> None:
        """Give the rows back. Nothing may run here any more."""
        assert not self.running.items
        self.rows.give_range(self.base, self.max_num_seqs)

    def unsteady_in_order(self) -> list[RunningRequest]:
        return sorted(self.unsteady, key=attrgetter("arrival")) if self.unsteady else []

    def can_ever_hold(self, request: RunningRequest) -> bool:
        """Whether the empty cache has room for the request at its longest. The last token is never run."""
        return blocks_for(request.longest - 1, self.block_size) <= self.pool.num_blocks

    def cached(self, request: RunningRequest) -> list[int]:
        """Blocks of the longest prefix of the request's tokens that this worker has cached."""
        if not self.prefix_caching:
            return []
        return self.pool.find(request.keys(request.cacheable(self.block_size), self.block_size))

    def slack(self, request: RunningRequest, cached: Sequence[int]) -> int:
        """Blocks left over if the request ran here and shared `cached`; negative if it does not fit now.

        Some blocks stay reserved for running requests to grow; otherwise the new request would soon be preempted.
        """
        own = blocks_for(request.length, self.block_size) - len(cached)
        return self.free_for_new - self.pool.num_idle(cached) - own

    @property
    def free_for_new(self) -> int:
        """Free blocks beside the reserved ones."""
        return self.pool.num_free - min(len(self.running), self.pool.num_blocks // 32)

    def take(self, request: RunningRequest, cached: Sequence[int]) -> None:
        """Run the request here, with blocks for all its tokens: a prefill that has begun never waits for memory."""
        assert request.cache is None
        length = len(request.tokens)
        request.row = self._free_rows.pop()
        self.rows.sit(request.row, request, length)
        request.cache = self
        request.claim = None
        self.pool.hold(cached)
        self.grow(request, list(cached))
        request.published = len(cached)
        self.grow(request, self.pool.allocate(blocks_for(length, self.block_size) - len(cached)))
        computed = len(cached) * self.block_size
        self.rows.computed[request.row] = self.rows.started[request.row] = computed
        if request.cached_tokens is None:
            request.cached_tokens = min(computed, request.num_prompt_tokens)
        else:
            request.resumptions += 1
        self.running.add(request)
        self.unsteady.add(request)
        self.backlog += request.remaining

    def grow(self, request: RunningRequest, blocks: list[int]) -> None:
        """Give the request further blocks."""
        request.blocks += blocks
        self.rows.room[request.row] = len(request.blocks) * self.block_size

    def run(self, request: RunningRequest, length: int) -> Chunk:
        """Put the request's next `length` tokens into flight."""
        before = request.remaining
        chunk = request.run(length)
        if chunk.samples:
            self.unsteady.discard(request)
        self.backlog += request.remaining - before
        return chunk

    def rollback(self, request: RunningRequest) -> None:
        """Drop the request's tokens in flight, so that they are run again."""
        before = request.remaining
        request.cut()
        self.unsteady.add(request)
        self.backlog += request.remaining - before

    def commit_but_last(self, request: RunningRequest) -> None:
        """Record the request's oldest chunk but for its last token, which has to run again, since no token was sampled
        after it. What was scheduled after it has run with a wrong token."""
        before = request.remaining
        request.land_but_last()
        self.unsteady.add(request)
        self.publish(request)
        self.backlog += request.remaining - before

    def commit(self, request: RunningRequest) -> None:
        """Record that the request's oldest chunk is in the KV cache for good. Blocks that are full now become known."""
        request.land()
        self.publish(request)

    def publish(self, request: RunningRequest) -> None:
        """Make known the request's full blocks that are not."""
        first, full = request.published, request.computed // self.block_size
        if self.prefix_caching and full > first:
            request.published = full
            keys = request.keys(full, self.block_size, first)
            for block, key in zip(request.blocks[first:full], keys, strict=True):
                self.pool.publish(block, key)

    def drop(self, request: RunningRequest, *, spoilt: bool = False) -> None:
        """Take the request and its blocks off this worker. The request keeps its tokens and loses what it computed.

        Another request may get the blocks at once, although a step in flight still writes to them: the worker runs
        that step before any later one, and a block becomes known only through what is written later.
        `spoilt`: its blocks must not become known.
        """
        assert request.cache is self
        if not spoilt:
            self.publish(request)
        self.running.remove(request)
        self.unsteady.discard(request)
        self.backlog -= request.remaining
        self.pool.free(request.blocks)
        self.forget.append(request.request_id)
        # this brings the newest tokens out of the row
        tokens = request.tokens
        assert len(tokens) == request.length
        self.rows.rise(request.row)
        self._free_rows.append(request.row)
        request.cache, request.row = None, -1
        request.blocks = []
        request.introduced_blocks = request.published = 0
        request.introduced = False
        request.flight = []

    def validate(self) -> None:
        """Asserts the invariants of this worker and of what runs on it."""
        items = self.running.items
        arrivals = [request.arrival for request in items]
        assert arrivals == sorted(set(arrivals)), "running sequences are out of order"
        self.pool.validate(block for request in items for block in request.blocks)
        assert self.backlog == sum(request.remaining for request in items)
        assert self.unsteady == {request for request in items if not request.steady}
        seated = [self.rows.requests[row] for row in range(self.base, self.base + self.max_num_seqs)]
        assert {r for r in seated if r is not None} == set(items)
        assert sorted(self._free_rows) == [row for row, r in enumerate(seated, self.base) if r is None]
        for request in items:
            known = len(request.tokens)
            assert known == request.length
            assert self.rows.requests[request.row] is request
            assert self.rows.room[request.row] == len(request.blocks) * self.block_size
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
