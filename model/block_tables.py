"""The sequences of a step as attention sees them, and the tables of the blocks in which their keys lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Piece = tuple[int, int, Sequence[int]]
"""(start, end, block_ids) of a sequence, whose tokens of the step are at positions start .. end - 1."""


def block_tables(pieces: Sequence[Piece], block_size: int) -> npt.NDArray[np.int64]:
    """A row of block ids for each sequence, as long as the longest sequence needs. Unused places are 0."""
    widest = max(-(-end // block_size) for _, end, _ in pieces)
    tables = np.zeros((len(pieces), widest), dtype=np.int64)
    fill_block_tables(tables, pieces, block_size)
    return tables


def fill_block_tables(tables: npt.NDArray[np.int64], pieces: Sequence[Piece], block_size: int) -> None:
    """Write the block ids of each sequence to its row, and leave the places behind them as they are."""
    for row, (_, end, blocks) in enumerate(pieces):
        used = -(-end // block_size)
        tables[row, :used] = blocks[:used]
