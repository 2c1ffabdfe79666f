"""Layers with a sliding window: which layers have a pool of blocks of their own, and what they see of a sequence.

The scheduler gives back the blocks before a window (actors/caches/windows.py), so these layers have block tables of
their own. For them a sequence begins shortly before its window: attention does not depend on where keys lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm

from elastic_moe.model.native.attention import CHUNK
from elastic_moe.model.trunk.attention_path import KVShape


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowGroup:
    """The layers whose blocks are given back."""

    layers: frozenset[int]
    tokens: int
    """Last tokens that they attend to, the newest one included; the widest window of all these layers."""

    def first_block(self, start: int, block_size: int) -> int:
        """Number of the first block that a token at position `start` reads."""
        return max(0, start - self.tokens + 1) // block_size

    def seen(
        self, start: int, end: int, first: int, block_ids: Sequence[int], block_size: int
    ) -> tuple[int, int, list[int]]:
        """The same tokens and block table for a sequence that begins shortly before its window.

        `block_ids` are the blocks from number `first` on. Native attention takes keys in chunks that begin at multiples
        of CHUNK, so the new beginning is one too: results keep their bits.
        """
        live = self.first_block(start, block_size)
        unit = lcm(CHUNK, block_size)
        begin = live * block_size // unit * unit
        ids = block_ids[live - first : -(-end // block_size) - first]
        # a block that is read and masked must be finite, which another sequence's might not be
        return start - begin, end - begin, [*list(ids[:1]) * (live - begin // block_size), *ids]


def window_group(shapes: Mapping[int, KVShape], *, max_model_len: int) -> WindowGroup | None:
    """The layers with a window that is shorter than `max_model_len`; None if there are none."""
    windows = {layer: s.window for layer, s in shapes.items() if s.window is not None and s.window < max_model_len}
    return WindowGroup(layers=frozenset(windows), tokens=max(windows.values())) if windows else None
