"""Which KV-cache blocks of one worker are free. The worker itself only obeys the block ids it is given."""

from __future__ import annotations

from collections.abc import Iterable


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class BlockPool:
    """Blocks 0 .. num_blocks - 1. The one freed last is handed out first: it is likeliest to be in a cache."""

    __slots__ = ("_free", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of blocks in use, 0..1."""
        return (self.num_blocks - len(self._free)) / self.num_blocks if self.num_blocks else 0.0

    def allocate(self, count: int) -> list[int]:
        """`count` blocks. The caller has made sure that as many are free."""
        assert 0 <= count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        if not count:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        taken.reverse()
        return taken

    def free(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))

    def validate(self, used: Iterable[int]) -> None:
        """Asserts that every block is either free or in `used`, once."""
        assert sorted([*self._free, *used]) == list(range(self.num_blocks)), "a KV block is leaked or used twice"
