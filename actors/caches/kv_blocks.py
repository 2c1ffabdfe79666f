"""The KV-cache blocks of one worker: which are free, and which full ones can be found by the tokens that they hold.

The scheduler keeps this record; the worker only writes to the block ids that it is given. A full block has a key: a
hash over its tokens and the key of the block before it (`next_key`). So equal keys mean equal tokens from the
beginning of the sequence. This is vLLM's automatic prefix caching.
"""

from __future__ import annotations

import functools
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_KEY_BYTES = 32
"""So long that nobody can make two texts with the same key: a request must never read another's keys and values."""


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Number of blocks that `num_tokens` tokens need."""
    return -(-num_tokens // block_size)


@functools.lru_cache(maxsize=1024)
def root_key(*, salt: str, variant: int) -> bytes:
    """The key before a sequence's first block. Sequences share blocks only if `salt` and `variant` are the same."""
    return blake2b(f"{variant}:{salt}".encode(), digest_size=_KEY_BYTES).digest()


def next_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full block of `token_ids`, if the block before it has the key `parent`."""
    numbers = token_ids if isinstance(token_ids, array) else array("i", token_ids)
    assert numbers.typecode == "i"
    return blake2b(parent + numbers.tobytes(), digest_size=_KEY_BYTES).digest()


class BlockPool:
    """Blocks 0 to num_blocks - 1, with the number of requests that refer to each.

    A block without references is free. It is *blank*, or it is *idle*: then it has a key, and a request with the same
    tokens can use it again. An idle block is overwritten only if no blank one is left, the least recently used first.
    Those that a window has passed are overwritten before the others.
    """

    __slots__ = ("_blank", "_blocks", "_idle", "_keys", "_passed", "_references", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        """A stack: the block that became blank last is allocated first, as a processor's cache may still hold it."""
        self._idle: dict[int, None] = {}
        """A set in the order in which the blocks became idle."""
        self._passed: dict[int, None] = {}
        """The idle blocks that a window has passed, in the same order. They are not in `_idle`."""
        self._references = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        """The key of each block; None: it has none. A list, because an entry of a dict takes four times as much."""
        self._blocks: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle) + len(self._passed)

    @property
    def usage(self) -> float:
        """Share of blocks that requests refer to, 0..1."""
        return (self.num_blocks - self.num_free) / self.num_blocks if self.num_blocks else 0.0

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks to write to. The caller has checked that so many are free."""
        assert 0 <= count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        taken = [self._blank.pop() if self._blank else self._overwrite() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def allocate_one(self) -> int | None:
        """Take one block to write to; None if none is free."""
        if self._blank:
            block = self._blank.pop()
        elif self._idle or self._passed:
            block = self._overwrite()
        else:
            return None
        self._references[block] = 1
        return block

    def _overwrite(self) -> int:
        idle = self._passed or self._idle
        block = next(iter(idle))
        del idle[block]
        self._lose_key(block)
        return block

    def _lose_key(self, block: int) -> None:
        key, self._keys[block] = self._keys[block], None
        assert key is not None
        del self._blocks[key]

    def publish(self, block: int, key: bytes) -> None:
        """Give a block in use its key, now that it is full. If another block has this key, only that one keeps it."""
        assert self._references[block], "a block that nobody holds may be overwritten at any time"
        if key not in self._blocks:
            self._blocks[key] = block
            self._keys[block] = key

    def forget(self, blocks: Iterable[int]) -> None:
        """Take the keys away from these blocks in use, so that no other request finds them."""
        for block in blocks:
            assert self._references[block], "a block that nobody holds may be overwritten at any time"
            if self._keys[block] is not None:
                self._lose_key(block)

    def retire(self, keys: Iterable[bytes]) -> None:
        """Let nobody find the blocks with these keys any more."""
        for key in keys:
            block = self._blocks.pop(key, None)
            if block is not None:
                self._keys[block] = None
                if not self._references[block]:
                    self._wake(block)
                    self._blank.append(block)

    def _wake(self, block: int) -> None:
        self._idle.pop(block, None)
        self._passed.pop(block, None)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks with these keys, up to the first key that no block has."""
        found: list[int] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def __contains__(self, key: bytes) -> bool:
        """Whether a block has this key."""
        return key in self._blocks

    def num_idle(self, blocks: Iterable[int]) -> int:
        return sum(block in self._idle or block in self._passed for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of these blocks, which have keys and must not be written to."""
        for block in blocks:
            self._references[block] += 1
            self._wake(block)

    def free(self, blocks: Sequence[int], *, passed: bool = False) -> None:
        """Remove a reference from each of a sequence's blocks.

        The end of the sequence is overwritten before its beginning, which more requests may share. `passed`: a window
        has passed these blocks.
        """
        idle = self._passed if passed else self._idle
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                if self._keys[block] is not None:
                    idle[block] = None
                else:
                    self._blank.append(block)

    def validate(self, used: Iterable[int]) -> None:
        """Assert that `used` has each block as often as it has references, and that the others are blank or idle."""
        counts = Counter(used)
        assert self._references == [counts[block] for block in range(self.num_blocks)], "a KV block is leaked"
        idle = [*self._idle, *self._passed]
        assert sorted([*self._blank, *idle, *counts]) == list(range(self.num_blocks)), "a free KV block is in use"
        keys = {block: key for block, key in enumerate(self._keys) if key is not None}
        assert keys.keys() >= set(idle)
        assert not keys.keys() & set(self._blank)
        assert {block: key for key, block in self._blocks.items()} == keys
