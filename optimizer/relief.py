"""The planner `relief`: the few swaps that take most of the excess off the busiest workers, found in milliseconds.

It answers a change of subject before there is time for a full plan. Each round takes, over all layers, the swap of the
busiest worker's item with another's that saves most computing, until a budget of moves is used or nothing gains. The
price of the moves is part of the problem's cost, and a table that costs more than the present one is not returned.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.cluster.placement import EMPTY, contiguous
from elastic_moe.optimizer.core.contract import Budget, Draft
from elastic_moe.optimizer.core.cost import price_table
from elastic_moe.optimizer.core.problem import FloatArray, IntArray, PlacementProblem

RELIEF_SHARE = 0.04
"""Largest share of all experts that are moved, but for one swap for each layer, where no smaller budget is given."""

MOST_SWAPS_A_LAYER = 8


def relief_plan(problem: PlacementProblem, budget: Budget) -> Draft:
    """Swaps from the current placement, or from the contiguous one where there is none of these workers."""
    current = problem.current
    if current is None or current.workers != problem.workers:
        current = contiguous(problem.num_layers, problem.num_experts, problem.workers)
    start = current.physical_to_logical_map
    most = max(int(RELIEF_SHARE * problem.loads.size), 2 * problem.num_layers)
    most = most if problem.move_budget is None else min(most, problem.move_budget)
    stay_s, swaps = price_table(problem, start).total_s, most // 2
    while swaps > 0:
        table, done = relieved(problem, start, swaps, budget)
        if price_table(problem, table).total_s < stay_s:
            return Draft(table=table, reason=f"the {done} swaps that take most off the busiest workers")
        # the first swaps gain most
        swaps = min(swaps, done) // 2
    return Draft(table=start.copy(), reason="no few swaps gain more than they cost")


def relieved(problem: PlacementProblem, start: IntArray, most: int, budget: Budget) -> tuple[IntArray, int]:
    """(`start` [L, S] after at most `most` swaps, the number of swaps). Each takes something off the busiest worker of
    a layer; the swaps that save most computing come first."""
    table, done = start.copy(), np.zeros(problem.num_layers, dtype=np.int64)
    price = problem.token_expert_s * problem.scale
    best = [_best_swap(problem, table[layer], layer) for layer in range(problem.num_layers)]
    swaps = 0
    while swaps < most and budget.left_s > 0:
        gains = np.array([gain for gain, _, _ in best]) * price * (done < MOST_SWAPS_A_LAYER)
        layer = int(gains.argmax())
        if gains[layer] <= 0:
            break
        _, i, j = best[layer]
        table[layer, [i, j]] = table[layer, [j, i]]
        best[layer] = _best_swap(problem, table[layer], layer)
        done[layer] += 1
        swaps += 1
    return table, swaps


def _best_swap(problem: PlacementProblem, row: IntArray, layer: int) -> tuple[float, int, int]:
    """(tokens by which the busiest worker of the layer has less, slot of that worker, slot of another) of the best
    swap; (0, 0, 0) where none gains."""
    held = row != EMPTY
    replicas = np.maximum(np.bincount(row[held], minlength=problem.num_experts), 1)
    item = np.where(held, problem.loads[layer][row] / replicas[row], 0.0)
    busy = np.bincount(problem.owner, item, len(problem.workers))
    late = busy / problem.speed
    worst = int(late.argmax())
    mine, theirs = np.flatnonzero(problem.owner == worst), np.flatnonzero(problem.owner != worst)
    change = item[mine][:, None] - item[theirs][None, :]
    here = (busy[worst] - change) / problem.speed[worst]
    there = (busy + 0.0)[problem.owner[theirs]] + change
    there = there / problem.speed[problem.owner[theirs]]
    others = _worst_of_others(late, worst)[problem.owner[theirs]]
    peak = np.maximum(np.maximum(here, there), others[None, :])
    peak[_doubles(problem, row, mine, theirs)] = np.inf
    i, j = divmod(int(peak.argmin()), len(theirs)) if peak.size else (0, 0)
    gain = float(late[worst] - peak[i, j]) if peak.size else 0.0
    return (gain, int(mine[i]), int(theirs[j])) if gain > 1e-9 * late[worst] else (0.0, 0, 0)


def _worst_of_others(late: FloatArray, worst: int) -> FloatArray:
    """[W] the latest worker but the worst one and each."""
    rest = late.copy()
    rest[worst] = 0.0
    first, second = int(rest.argmax()), float(np.sort(rest)[-2]) if len(rest) > 1 else 0.0
    return np.asarray(np.where(np.arange(len(late)) == first, second, rest[first]))


def _doubles(problem: PlacementProblem, row: IntArray, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """[M, T] whether a swap would put two replicas of one expert on one worker."""
    on = np.zeros((problem.num_experts + 1, len(problem.workers)), dtype=bool)
    on[row, problem.owner] = True
    on[EMPTY] = False
    worst = problem.owner[mine[0]]
    return np.asarray(on[row[mine]][:, problem.owner[theirs]] | on[row[theirs], worst][None, :])
