"""What batching knows of one worker: its KV-cache blocks, what runs there, and what it must be told to forget."""

from __future__ import annotations

from actors.kv_blocks import BlockPool, blocks_for
from actors.sequences import Queue, Sequence
from cluster.placement import WorkerId
from cluster.protocol import RequestId


class Home:
    """One worker: its KV blocks, the sequences that run there, and what it must still be told to forget."""

    __slots__ = ("backlog", "block_size", "draining", "forget", "pool", "running", "worker")

    def __init__(self, worker: WorkerId, num_kv_blocks: int, block_size: int) -> None:
        self.worker = worker
        self.block_size = block_size
        self.pool = BlockPool(num_kv_blocks)
        self.running = Queue()
        self.backlog = 0
        """Sum of `remaining` over the running sequences."""
        self.forget: list[RequestId] = []
        """Sequences that have left, and that no committed plan has named."""
        self.draining = False

    def can_ever_hold(self, sequence: Sequence) -> bool:
        """Whether the empty cache holds it at its longest. The last token is never run, so it needs no place."""
        return blocks_for(sequence.longest - 1, self.block_size) <= self.pool.num_blocks

    def slack(self, sequence: Sequence) -> int:
        """Blocks left over if it came here; negative where it does not fit now.

        Some are kept for the running ones to grow, or it would soon be preempted for them and computed again.
        """
        headroom = min(len(self.running), self.pool.num_blocks // 32)
        return self.pool.num_free - headroom - blocks_for(len(sequence.tokens), self.block_size)

    def take(self, sequence: Sequence) -> None:
        """Make it run here, with blocks for all the tokens it has: a prefill that has begun never waits for memory."""
        assert sequence.home is None
        sequence.home = self
        sequence.claim = None
        sequence.blocks = self.pool.allocate(blocks_for(len(sequence.tokens), self.block_size))
        self.running.add(sequence)
        self.backlog += sequence.remaining

    def drop(self, sequence: Sequence) -> None:
        """Take it off this worker, with its blocks. It keeps its tokens, and what it computed is lost."""
        assert sequence.home is self
        self.running.remove(sequence)
        self.backlog -= sequence.remaining
        self.pool.free(sequence.blocks)
        self.forget.append(sequence.request_id)
        sequence.home = None
        sequence.blocks = []
        sequence.computed = sequence.told_blocks = 0
        sequence.told = False

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
            assert sequence.told or sequence.computed == sequence.told_blocks == 0
            assert 0 <= sequence.told_blocks <= len(sequence.blocks)
            # The newest token gets its place only when it is scheduled.
            assert blocks_for(known - 1, self.block_size) <= len(sequence.blocks) <= blocks_for(known, self.block_size)
            assert blocks_for(sequence.computed, self.block_size) <= len(sequence.blocks)
