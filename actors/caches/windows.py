"""The blocks of one worker's layers with a sliding window: a pool of their own, of which every request holds few.

A layer with a window of W tokens reads no keys further back. So a request gives its blocks before the window back while
it goes on, and takes blocks for a chunk of its prompt only when the chunk is run. Blocks that have been given back can
still be found by their tokens, but are overwritten before all others. A cached prefix of a request is of use as far as
the blocks of the window before its end are there too. This is what vLLM's hybrid KV cache manager does.

A step may be run again, so only what is committed gives blocks back. A request reserves the blocks that it needs while
it decodes, and more than that only while a chunk of its prompt is in flight. So it never waits for a block once it
decodes, and a prompt can always go on, by small chunks if need be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elastic_moe.actors.caches.kv_blocks import BlockPool, blocks_for
from elastic_moe.cluster.messages.epochs import WindowRoom, window_blocks
from elastic_moe.cluster.messages.steps import WindowBlocks

if TYPE_CHECKING:
    from elastic_moe.actors.caches.running_requests import RunningRequest


@dataclass(slots=True)
class WindowTable:
    """A running request's blocks in these layers."""

    first: int = 0
    """Number of its first block here, in the sequence."""
    blocks: list[int] = field(default_factory=list)
    reserved: int = 0
    """Most blocks that it may hold now."""

    @property
    def end(self) -> int:
        return self.first + len(self.blocks)


class Windows:
    """See the module. The requests' tables are theirs, and only this class changes them."""

    __slots__ = ("_ahead", "_block_size", "_reserved", "_tokens", "per_request", "pool")

    def __init__(self, room: WindowRoom, block_size: int) -> None:
        self.pool = BlockPool(room.blocks)
        self.per_request = window_blocks(room.tokens, steps_in_flight=room.steps_in_flight, block_size=block_size)
        """Most blocks of a request that decodes, however long it is."""
        self._tokens = room.tokens
        self._block_size = block_size
        self._ahead = blocks_for(room.steps_in_flight, block_size)
        """Blocks for the tokens that may go into flight behind a chunk before the chunk is committed."""
        self._reserved = 0

    @property
    def spare(self) -> int:
        """Blocks that are not reserved."""
        return self.pool.num_blocks - self._reserved

    @property
    def usage(self) -> float:
        """Share of blocks that are reserved, 0..1."""
        return self._reserved / self.pool.num_blocks

    def needs(self, request: RunningRequest) -> int:
        """The blocks that must not be reserved yet for the request to begin."""
        return min(self.per_request, self._most(request))

    def _most(self, request: RunningRequest) -> int:
        """Blocks of the request at its longest. The last token is never run."""
        return blocks_for(request.longest - 1, self._block_size)

    def _first(self, computed: int) -> int:
        """Number of the first block that the tokens after `computed` ones read."""
        return max(0, computed - self._tokens + 1) // self._block_size

    def longest(self, keys: Sequence[bytes]) -> int:
        """Number of the first keys up to the last one at whose end a request may begin; 0 if it may at none."""
        found = best = 0
        for count, key in enumerate(keys, 1):
            found = found + 1 if key in self.pool else 0
            if found >= count - self._first(count * self._block_size):
                best = count
        return best

    def begin(self, request: RunningRequest, cached: int) -> None:
        """Give the request a table. It begins behind its first `cached` blocks, as `longest` allows."""
        first = self._first(cached * self._block_size)
        table = request.window = WindowTable(first)
        table.blocks = self.pool.find(request.keys(cached, self._block_size, first))
        assert table.end == cached
        self.pool.hold(table.blocks)
        self._reserve(request, table)

    def room(self, request: RunningRequest) -> int:
        """Tokens of its prompt that the request may run now. At least one, if none of them is in flight."""
        table, most = _table(request), self._most(request)
        left = self.spare + table.reserved
        held = most if left >= most else left - self._ahead
        return (table.first + held) * self._block_size - request.started

    def run(self, request: RunningRequest, length: int) -> WindowBlocks:
        """Get blocks for the request's next `length` tokens. Returns all its blocks, which are few."""
        end = blocks_for(request.started + length, self._block_size)
        if request.started + length == request.known:
            # from here on both tables grow together
            end = max(end, len(request.blocks))
        table = self._extend(request, end)
        return WindowBlocks(first=table.first, ids=tuple(table.blocks))

    def grow(self, request: RunningRequest) -> None:
        """Get the block for the newest token of a request that goes on by rule."""
        self.slide(request)
        self._extend(request, len(request.blocks))

    def _extend(self, request: RunningRequest, end: int) -> WindowTable:
        table = _table(request)
        table.blocks += self.pool.allocate(max(0, end - table.end))
        self._reserve(request, table)
        return table

    def publish(self, request: RunningRequest, first: int, keys: Iterable[bytes]) -> None:
        """Make known the request's full blocks from number `first` on, as far as it still holds them."""
        table = _table(request)
        for number, key in enumerate(keys, first):
            if number >= table.first:
                self.pool.publish(table.blocks[number - table.first], key)

    def slide(self, request: RunningRequest) -> None:
        """Give back the blocks that lie before the window of the first token that is not committed."""
        table = _table(request)
        passed = self._first(request.computed) - table.first
        if passed > 0:
            self.pool.free(table.blocks[:passed], passed=True)
            del table.blocks[:passed]
            table.first += passed
            self._reserve(request, table)

    def cut(self, request: RunningRequest) -> None:
        """Give back the blocks of tokens that were in flight."""
        table = _table(request)
        kept = max(0, blocks_for(request.computed, self._block_size) - table.first)
        self.pool.free(table.blocks[kept:])
        del table.blocks[kept:]
        self._reserve(request, table)

    def end(self, request: RunningRequest) -> None:
        """The request leaves."""
        table = _table(request)
        self.pool.free(table.blocks)
        self._reserved -= table.reserved
        request.window = None

    def _reserve(self, request: RunningRequest, table: WindowTable) -> None:
        left = self.spare + table.reserved
        wanted = max(self.needs(request), min(len(table.blocks) + self._ahead, self._most(request)))
        reserved = min(wanted, left)
        assert reserved >= max(len(table.blocks), self.needs(request)), "a request holds blocks of other requests"
        self._reserved += reserved - table.reserved
        table.reserved = reserved

    def validate(self, requests: Sequence[RunningRequest]) -> None:
        """Asserts the invariants of the pool and of the requests' tables."""
        tables = [_table(request) for request in requests]
        self.pool.validate(block for table in tables for block in table.blocks)
        assert self._reserved == sum(table.reserved for table in tables) <= self.pool.num_blocks
        for request, table in zip(requests, tables, strict=True):
            assert len(table.blocks) <= table.reserved
            assert table.first <= self._first(request.computed), "a block within the window is lost"
            assert blocks_for(request.started, self._block_size) <= table.end <= len(request.blocks)
            assert not request.steady or table.end == len(request.blocks)
            assert request.flight or len(table.blocks) <= self.per_request, "a request holds more than its window"


def _table(request: RunningRequest) -> WindowTable:
    assert request.window is not None
    return request.window
