"""What the scheduler knows of one worker: its KV-cache blocks, its requests, and the requests it must still forget.

Prefix caching: a request begins with the longest known prefix of its tokens. It shares the blocks of that prefix and
never writes to them. Its own full blocks become known when the step that computed them is committed, and not before,
because a step in flight may fail halfway; those of tokens that it generates by rule become known when it leaves the
worker. The last token is always computed, because its logits are needed. A worker that ends takes its cached blocks
with it.

In a model with a state per sequence, a request can begin only where there is also a snapshot of the states
(actors/caches/snapshots.py). Snapshots are taken after three blocks: the last full one of a prompt; the one up to
which a prompt's keys are cached further than its states, since other prompts share that beginning; and the last full
one of an answer, where the next turn of a conversation goes on. Such a request never goes on by rule: each of its
chunks says what to do with the states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

from elastic_moe.actors.caches.kv_blocks import BlockPool, blocks_for
from elastic_moe.actors.caches.rows import Rows
from elastic_moe.actors.caches.running_requests import OrderedRequests, RunningRequest
from elastic_moe.actors.caches.snapshots import SnapshotPool
from elastic_moe.actors.caches.windows import Windows
from elastic_moe.cluster.messages.epochs import StateRoom, WindowRoom
from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.steps import Chunk, SavedState, StateUse
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
        "snapshots",
        "state_room",
        "unsteady",
        "window_room",
        "windows",
        "worker",
    )

    def __init__(
        self,
        worker: WorkerId,
        num_kv_blocks: int,
        rows: Rows,
        *,
        max_num_seqs: int,
        prefix_caching: bool = True,
        state_room: StateRoom | None = None,
        window_room: WindowRoom | None = None,
    ) -> None:
        """`rows` is shared by all workers. At most `max_num_seqs` requests run here. `state_room`: None if the model
        keeps nothing but keys and values. `window_room`: None if it keeps those of all tokens in every layer."""
        self.worker = worker
        self.block_size = rows.block_size
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(num_kv_blocks)
        self.state_room = state_room
        self.snapshots = SnapshotPool(0 if state_room is None else state_room.snapshots)
        self.window_room = window_room
        self.windows = None if window_room is None else Windows(window_room, rows.block_size)
        """The blocks of layers with a sliding window. `pool` has those of the other layers."""
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

    @property
    def whole_room(self) -> tuple[int, StateRoom | None, WindowRoom | None]:
        return self.pool.num_blocks, self.state_room, self.window_room

    @property
    def seats(self) -> float:
        """Most requests whose states the worker has memory for."""
        return math.inf if self.state_room is None else self.state_room.seats

    def has_seat(self, max_num_seqs: int) -> bool:
        return len(self.running) < min(max_num_seqs, self.seats)

    def unsteady_in_order(self) -> list[RunningRequest]:
        return sorted(self.unsteady, key=attrgetter("arrival")) if self.unsteady else []

    def can_ever_hold(self, request: RunningRequest) -> bool:
        """Whether the empty cache has room for the request at its longest. The last token is never run."""
        if self.windows is not None and self.windows.needs(request) > self.windows.pool.num_blocks:
            return False
        return blocks_for(request.longest - 1, self.block_size) <= self.pool.num_blocks

    def cached(self, request: RunningRequest) -> list[int]:
        """Blocks of the longest prefix of the request's tokens that this worker has cached."""
        if not self.prefix_caching:
            return []
        keys = request.keys(request.cacheable(self.block_size), self.block_size)
        found = self.pool.find(keys)
        return found[: self._longest(keys[: len(found)])]

    def _longest(self, keys: list[bytes]) -> int:
        """Number of the first of these keys up to the last one at whose end a request may begin."""
        while True:
            count = len(keys)
            if self.windows is not None:
                keys = keys[: self.windows.longest(keys)]
            if self.state_room is not None:
                keys = keys[: self.snapshots.longest(keys)]
            if len(keys) == count:
                return count

    @property
    def usage(self) -> float:
        """Share of blocks that are taken, 0..1, of the kind of blocks that is scarcer."""
        return self.pool.usage if self.windows is None else max(self.pool.usage, self.windows.usage)

    def slack(self, request: RunningRequest, cached: Sequence[int]) -> int:
        """Blocks left over if the request ran here and shared `cached`; negative if it does not fit now.

        Some blocks stay reserved for running requests to grow; otherwise the new request would soon be preempted.
        """
        own = blocks_for(request.length, self.block_size) - len(cached)
        left = self.free_for_new - self.pool.num_idle(cached) - own
        return left if self.windows is None else min(left, self.windows.spare - self.windows.needs(request))

    @property
    def free_for_new(self) -> int:
        """Free blocks beside the reserved ones."""
        return self.pool.num_free - min(len(self.running), self.pool.num_blocks // 32)

    def take(self, request: RunningRequest, cached: Sequence[int]) -> None:
        """Run the request here, with blocks for all its tokens: a prefill that has begun never waits for memory."""
        assert request.cache is None
        length, computed = len(request.tokens), len(cached) * self.block_size
        row = self._free_rows.pop()
        self.rows.sit(row, request, length)
        self.rows.begin(row, computed)
        request.sit(self, row, computed)
        self.pool.hold(cached)
        self.grow(request, list(cached))
        request.published = len(cached)
        self.grow(request, self.pool.allocate(blocks_for(length, self.block_size) - len(cached)))
        if self.windows is not None:
            self.windows.begin(request, len(cached))
        if self.state_room is not None and self.prefix_caching:
            self._choose_snapshots(request, len(cached))
        self.running.add(request)
        self.unsteady.add(request)
        self.backlog += request.remaining

    def _choose_snapshots(self, request: RunningRequest, cached: int) -> None:
        """Note where the request's states come from, and after which blocks of its known tokens they are kept."""
        keys = request.keys((len(request.tokens) - 1) // self.block_size, self.block_size)
        if cached:
            request.restore = self.snapshots.pin(keys[cached - 1])
        shared = len(self.pool.find(keys))
        request.borders = sorted(border for border in {shared, len(keys)} if border > cached)

    def grow(self, request: RunningRequest, blocks: list[int]) -> None:
        """Give the request further blocks."""
        request.blocks += blocks
        self.rows.hold(request.row, len(request.blocks) * self.block_size)

    def run(self, request: RunningRequest, length: int) -> Chunk:
        """Put the request's next `length` tokens into flight."""
        before = request.remaining
        windows = None if self.windows is None else self.windows.run(request, length)
        chunk = request.run(length, None if self.state_room is None else self._use_states(request, length), windows)
        if request.steady:
            self.unsteady.discard(request)
        self.backlog += request.remaining - before
        return chunk

    def room(self, request: RunningRequest) -> float:
        """Tokens of its prompt that the request has room for now. At least one, if none of them is in flight."""
        return math.inf if self.windows is None else self.windows.room(request)

    def grow_window(self, request: RunningRequest) -> None:
        """Get the block for the newest token of a request that goes on by rule, in layers with a sliding window."""
        assert self.windows is not None
        # before the window passes them
        self.publish(request)
        self.windows.grow(request)

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
        self._cut(request)
        self.backlog += request.remaining - before

    def _cut(self, request: RunningRequest) -> None:
        self._give_back(request)
        request.cut()
        self.unsteady.add(request)
        if self.windows is not None:
            self.windows.cut(request)

    def _give_back(self, request: RunningRequest) -> None:
        """Give back the places of snapshots that steps in flight write to."""
        for chunk in request.flight:
            for saved in _saved(chunk):
                self.snapshots.give_back(saved.place)

    def commit_but_last(self, request: RunningRequest) -> bool:
        """Record the request's oldest chunk but for its last token, which has to run again, since no token was sampled
        after it. What was scheduled after it has run with a wrong token.

        Returns False if the whole chunk has to run again: a state cannot be set back by one token.
        """
        before = request.remaining
        landed = self.state_room is None
        if landed:
            request.land_but_last()
            self.unsteady.add(request)
            self.publish(request)
            if self.windows is not None:
                self.windows.slide(request)
                self.windows.cut(request)
        else:
            self._cut(request)
        self.backlog += request.remaining - before
        return landed

    def commit(self, request: RunningRequest) -> None:
        """Record that the request's oldest chunk is in the KV cache for good. Blocks that are full now become known."""
        chunk = request.flight[0] if request.flight else None
        request.land()
        self.publish(request)
        if self.windows is not None:
            self.windows.slide(request)
        if chunk is not None and chunk.state is not None:
            self._land_states(request, chunk)

    def publish(self, request: RunningRequest) -> None:
        """Make known the request's full blocks that are not."""
        first, full = request.published, request.computed // self.block_size
        if self.prefix_caching and full > first:
            request.published = full
            keys = request.keys(full, self.block_size, first)
            for block, key in zip(request.blocks[first:full], keys, strict=True):
                self.pool.publish(block, key)
            if self.windows is not None:
                self.windows.publish(request, first, keys)

    def _land_states(self, request: RunningRequest, chunk: Chunk) -> None:
        self._unpin(request)
        for saved in _saved(chunk):
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
        keys = request.keys(request.computed // self.block_size, self.block_size)
        if self.windows is not None:
            self.windows.pool.retire(keys)
        for key in keys:
            self.snapshots.retire(key)

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
        if self.windows is not None:
            self.windows.end(request)
        self.forget.append(request.request_id)
        self._give_back(request)
        self._unpin(request)
        # this brings the newest tokens out of the row
        tokens = request.tokens
        assert len(tokens) == request.length
        self.rows.rise(request.row)
        self._free_rows.append(request.row)
        request.rise()

    def validate(self) -> None:
        """Asserts the invariants of this worker and of what runs on it."""
        items = self.running.items
        arrivals = [request.arrival for request in items]
        assert arrivals == sorted(set(arrivals)), "running sequences are out of order"
        self.pool.validate(block for request in items for block in request.blocks)
        if self.windows is not None:
            self.windows.validate(items)
        assert self.backlog == sum(request.remaining for request in items)
        self.snapshots.validate(
            pinned=[request.restore for request in items if request.restore is not None],
            writing=[saved.place for request in items for chunk in request.flight for saved in _saved(chunk)],
        )
        assert self.state_room is None or self.unsteady == set(items), "a state has no place in the columns"
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


def _saved(chunk: Chunk) -> tuple[SavedState, ...]:
    return () if chunk.state is None else chunk.state.save
