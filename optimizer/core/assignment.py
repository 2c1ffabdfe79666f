"""Solves the assignment problem: every row gets a column of its own at the least total cost."""

from __future__ import annotations

import numpy as np

from elastic_moe.optimizer.core.problem import FloatArray, IntArray


def assign(cost: FloatArray) -> IntArray:
    """[n] column of each row of a square cost matrix [n, n]; optimal, O(n^3).

    Source: the Hungarian method (Kuhn 1955) as shortest augmenting paths with potentials (Jonker and Volgenant 1987).
    """
    size = len(cost)
    row_price, column_price = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.full(size + 1, -1, dtype=np.int32)  # row of each column; a path begins at the last column
    for row in range(size):
        row_of[size] = row
        column, slack = size, np.full(size, np.inf)
        came_from = np.full(size, size, dtype=np.int32)
        seen = np.zeros(size + 1, dtype=bool)
        while row_of[column] >= 0:
            seen[column] = True
            here = row_of[column]
            reduced = cost[here] - row_price[here] - column_price[:size]
            better = ~seen[:size] & (reduced < slack)
            slack[better] = reduced[better]
            came_from[better] = column
            column = int(np.argmin(np.where(seen[:size], np.inf, slack)))
            step = slack[column]
            row_price[row_of[seen]] += step
            column_price[seen] -= step
            slack[~seen[:size]] -= step
        while column != size:
            row_of[column] = row_of[came_from[column]]
            column = int(came_from[column])
    columns = np.empty(size, dtype=np.int32)
    columns[row_of[:size]] = np.arange(size)
    return columns
