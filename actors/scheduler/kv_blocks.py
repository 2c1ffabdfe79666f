"""Which KV-cache blocks of one worker are free, and which full ones hold a known text. The worker itself only obeys the
block ids it is given.

A full block is known by a key: a hash chained over the blocks before it (`next_key`), so that equal keys mean equal
tokens from the sequence's very beginning. This is vLLM's automatic prefix caching.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_KEY_BYTES = 32
"""No two texts that anybody can find have the same key: one request must never be given another's keys and values."""


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


def root_key(*, salt: str, variant: int) -> bytes:
    """What a chain begins with: sequences share blocks only where `salt` and `variant` are the same."""
    return blake2b(f"{variant}:{salt}".encode(), digest_size=_KEY_BYTES).digest()


def next_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full block of `token_ids` that follows the block known by `parent`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=_KEY_BYTES).digest()


class BlockPool:
    """Blocks 0 .. num_blocks - 1, counted by references.

    A block that is known outlives its last reference: it is *idle* then, and may be taken up again by its key. Idle
    ones are overwritten only when no blank one is left, the least recently used first.
    """

    __slots__ = ("_blank", "_blocks", "_idle", "_keys", "_references", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        """The one that became blank last is handed out first: it is likeliest to be in a processor's cache."""
        self._idle: dict[int, None] = {}
        """In the order in which they became idle."""
        self._references = [0] * num_blocks
        self._keys: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of blocks in use, 0..1. Idle ones are free."""
        return (self.num_blocks - self.num_free) / self.num_blocks if self.num_blocks else 0.0

    def allocate(self, count: int) -> list[int]:
        """`count` blocks to write to. The caller has made sure that as many are free."""
        assert 0 <= count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        taken = [self._blank.pop() if self._blank else self._overwrite() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def _overwrite(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        del self._blocks[self._keys.pop(block)]
        return block

    def publish(self, block: int, key: bytes) -> None:
        """A block in use is full, and known from now on. Of two with the same content the first stays known."""
        assert self._references[block], "a block that nobody holds may be overwritten at any time"
        if key not in self._blocks:
            self._blocks[key] = block
            self._keys[block] = key

    def forget(self, blocks: Iterable[int]) -> None:
        """What these blocks in use hold is not to be found any more. They go on being used."""
        for block in blocks:
            assert self._references[block], "a block that nobody holds may be overwritten at any time"
            if block in self._keys:
                del self._blocks[self._keys.pop(block)]

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks known by `keys`, up to the first that is unknown."""
        found: list[int] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        return sum(block in self._idle for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these known blocks, which are not to be written to."""
        for block in blocks:
            self._references[block] += 1
            self._idle.pop(block, None)

    def free(self, blocks: Sequence[int]) -> None:
        """One reference less to each. A sequence's end is overwritten before its beginning, which more may share."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._blank.append(block)

    def validate(self, used: Iterable[int]) -> None:
        """Asserts that every block is in `used` as often as it is referred to, else blank, or idle and known."""
        counts = Counter(used)
        assert self._references == [counts[block] for block in range(self.num_blocks)], "a KV block is leaked"
        assert sorted([*self._blank, *self._idle, *counts]) == list(range(self.num_blocks)), "a free KV block is in use"
        assert self._idle.keys() <= self._keys.keys()
        assert not self._keys.keys() & set(self._blank)
        assert {block: key for key, block in self._blocks.items()} == self._keys
