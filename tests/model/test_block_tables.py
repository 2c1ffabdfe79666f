"""Block tables: a row for each sequence, of the blocks that hold its keys."""

import numpy as np

from elastic_moe.model.block_tables import block_tables, fill_block_tables


def test_rows_have_the_blocks_that_hold_keys() -> None:
    pieces = [(0, 4, [7, 8, 9]), (8, 9, [1, 2, 3]), (3, 4, [5])]
    assert block_tables(pieces, 4).tolist() == [[7, 0, 0], [1, 2, 3], [5, 0, 0]]


def test_places_behind_the_blocks_stay() -> None:
    tables = np.full((2, 3), 6, dtype=np.int64)
    fill_block_tables(tables, [(0, 5, [1, 2, 3])], 4)
    assert tables.tolist() == [[1, 2, 6], [6, 6, 6]]
