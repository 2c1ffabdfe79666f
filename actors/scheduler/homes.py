"""What batching knows of one worker: its KV-cache blocks, what runs there, and what it must be told to forget.

Prefix caching: a sequence begins with the longest known prefix of its tokens, whose blocks it shares and never writes
to. Its own full blocks become known when the step that computed them is committed, and not before: a step in flight may
fail halfway. The last token is always computed, for its logits. What a worker has cached goes with the worker.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnly

from elastic_moe.actors.scheduler.kv_blocks import BlockPool, blocks_for
from elastic_moe.actors.scheduler.sequences import Queue, Sequence
from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.steps import Chunk
from elastic_moe.cluster.placement import WorkerId


class Home:
    """One worker: its KV blocks, the sequences that run there, and what it must still be told to forget."""

    __slots__ = ("backlog", "block_size", "draining", "forget", "pool", "prefix_caching", "running", "worker")

    def __init__(self, worker: WorkerId, num_kv_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.worker = worker
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(num_kv_blocks)
        self.running = Queue()
        self.backlog = 0
        """Sum of `remaining` over the running sequences."""
        self.forget: list[RequestId] = []
        """Sequences that have left, and that no committed plan has named."""
        self.draining = False

    @property
    def decoding(self) -> bool:
        """Whether a request here waits for just its next token, which is not in flight yet if it is the last."""
        return any(sequence.remaining == 1 and not sequence.exhausted for sequence in self.running.items)

    def can_ever_hold(self, sequence: Sequence) -> bool:
        """Whether the empty cache holds it at its longest. The last token is never run, so it needs no place."""
        return blocks_for(sequence.longest - 1, self.block_size) <= self.pool.num_blocks

    def cached(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest prefix of its tokens that is known here."""
        if not self.prefix_caching:
            return []
        return self.pool.find(sequence.keys((len(sequence.tokens) - 1) // self.block_size, self.block_size))

    def slack(self, sequence: Sequence, cached: ReadOnly[int]) -> int:
        """Blocks left over if it came here and shared `cached`; negative where it does not fit now.

        Some are kept for the running ones to grow, or it would soon be preempted for them and computed again.
        """
        headroom = min(len(self.running), self.pool.num_blocks // 32)
        free = self.pool.num_free - self.pool.num_idle(cached)
        return free - headroom - blocks_for(len(sequence.tokens), self.block_size) + len(cached)

    def take(self, sequence: Sequence, cached: ReadOnly[int]) -> None:
        """Make it run here, with blocks for all the tokens it has: a prefill that has begun never waits for memory."""
        assert sequence.home is None
        sequence.home = self
        sequence.claim = None
        self.pool.hold(cached)
        own = blocks_for(len(sequence.tokens), self.block_size) - len(cached)
        sequence.blocks = [*cached, *self.pool.allocate(own)]
        sequence.computed = len(cached) * self.block_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.computed, sequence.num_prompt_tokens)
        self.running.add(sequence)
        self.backlog += sequence.remaining

    def run(self, sequence: Sequence, length: int) -> Chunk:
        """Its next `length` tokens are in flight."""
        before = sequence.remaining
        chunk = sequence.run(length)
        self.backlog += sequence.remaining - before
        return chunk

    def rollback(self, sequence: Sequence) -> None:
        """None of its tokens in flight count."""
        before = sequence.remaining
        sequence.flight.clear()
        self.backlog += sequence.remaining - before

    def commit(self, sequence: Sequence) -> None:
        """Its oldest chunk in flight is in the KV cache, for good: blocks that are full now become known."""
        first = sequence.computed // self.block_size
        sequence.land()
        full = sequence.computed // self.block_size
        if self.prefix_caching and full > first:
            for number, key in enumerate(sequence.keys(full, self.block_size)[first:], first):
                self.pool.publish(sequence.blocks[number], key)

    def drop(self, sequence: Sequence) -> None:
        """Take it off this worker, with its blocks. It keeps its tokens, and what it computed is lost.

        Its blocks may be given to another at once, though a step in flight still writes to them: the host runs that
        step before any that is made from now on, and a block becomes known only through what is written after.
        """
        assert sequence.home is self
        self.running.remove(sequence)
        self.backlog -= sequence.remaining
        self.pool.free(sequence.blocks)
        self.forget.append(sequence.request_id)
        sequence.home = None
        sequence.blocks = []
        sequence.computed = sequence.told_blocks = 0
        sequence.told = False
        sequence.flight = []

    def validate(self) -> None:
        """Asserts the invariants of this worker and of what runs on it."""
        items = self.running.items
        arrivals = [sequence.arrival for sequence in items]
        assert arrivals == sorted(set(arrivals)), "running sequences are out of order"
        self.pool.validate(block for sequence in items for block in sequence.blocks)
        assert self.backlog == sum(sequence.remaining for sequence in items)
        for sequence in items:
            known = len(sequence.tokens)
            assert sequence.home is self
            assert not sequence.ended
            assert 0 <= sequence.computed < known
            assert sequence.computed <= sequence.started < sequence.known
            assert sequence.told or sequence.told_blocks == 0
            assert 0 <= sequence.told_blocks <= len(sequence.blocks)
            # The newest token gets its place only when it is scheduled, and keeps it when its step is rolled back.
            assert blocks_for(known - 1, self.block_size) <= len(sequence.blocks)
            assert len(sequence.blocks) <= blocks_for(sequence.longest - 1, self.block_size)
            assert blocks_for(sequence.started, self.block_size) <= len(sequence.blocks)
