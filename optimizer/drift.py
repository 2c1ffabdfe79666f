"""Re-placement from a placement in force: what each byte moved is worth, and the best plan within a budget of moves.

The price of a move is raised until little moves and lowered step by step; every price gives one plan, all of them the
curve of gain against bytes. Swaps that only pay at a low price come late, so the first moves on the curve are the
ones that matter.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from cluster.errors import PlacementError
from optimizer.cost import copies, price_table
from optimizer.draft import Budget, Draft
from optimizer.local_search import FROM_CURRENT, JointSearch
from optimizer.problem import IntArray, PlacementProblem
from optimizer.result import Termination

PRICES = 14
"""Steps of the price of a move, from the highest that anything moves at down to next to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrontierPoint:
    """One plan on the curve."""

    table: IntArray
    """[L, S]"""
    moves: int
    step_s: float
    """Seconds per step under it, migration not counted."""


def frontier(problem: PlacementProblem, budget: Budget, most_moves: int | None = None) -> list[FrontierPoint]:
    """Plans from the current placement, by ascending moves; the first is to stay. Ends early where `most_moves` is
    passed.

    Raises PlacementError where there is no current placement of the problem's workers.
    """
    current = problem.current
    if current is None or current.workers != problem.workers:
        raise PlacementError("current: a placement of the same workers is needed to weigh moves against gain")
    table = current.physical_to_logical_map
    stay = FrontierPoint(table=table, moves=0, step_s=price_table(problem, table).step_s)
    points = [stay]
    for k, price_s in enumerate(np.geomspace(stay.step_s / problem.num_layers / 4, stay.step_s * 1e-6, PRICES)):
        priced = dataclasses.replace(problem, expert_bytes=_bytes_for(problem, float(price_s)))
        search = JointSearch(priced, points[-1].table)
        search.sweep(budget.share(1 / (PRICES - k)).ends, FROM_CURRENT)
        point = FrontierPoint(
            table=search.table.copy(),
            moves=copies(problem, search.table),
            step_s=price_table(problem, search.table).step_s,
        )
        if most_moves is not None and point.moves > most_moves:
            point = _trimmed(problem, point, most_moves)
            points.append(point)
            break
        points.append(point)
        if budget.left_s <= 0:
            break
    return sorted(points, key=lambda p: (p.moves, p.step_s))


def _bytes_for(problem: PlacementProblem, price_s: float) -> int:
    """Expert bytes that make one move cost `price_s` per step."""
    unit = dataclasses.replace(problem, expert_bytes=10**9)
    from optimizer.cost import move_price

    return max(int(10**9 * price_s / move_price(unit)), 1)


def _trimmed(problem: PlacementProblem, point: FrontierPoint, most: int) -> FrontierPoint:
    """Take whole layers back to the current placement, those that gain least per move first, until at most `most`
    move."""
    assert problem.current is not None
    old, table = problem.current.physical_to_logical_map, point.table.copy()
    while copies(problem, table) > most:
        worth = []
        base_s = price_table(problem, table).step_s
        for layer in np.flatnonzero((table != old).any(axis=1)):
            trial = table.copy()
            trial[layer] = old[layer]
            saved = copies(problem, table) - copies(problem, trial)
            worth.append(((price_table(problem, trial).step_s - base_s) / max(saved, 1e-9), int(layer)))
        table[min(worth)[1]] = old[min(worth)[1]]
    return FrontierPoint(table=table, moves=copies(problem, table), step_s=price_table(problem, table).step_s)


def within_budget(problem: PlacementProblem, budget: Budget) -> Draft:
    """The best plan that moves at most `problem.move_budget` experts."""
    assert problem.move_budget is not None
    points = frontier(problem, budget, problem.move_budget)
    allowed = [point for point in points if point.moves <= problem.move_budget]
    best = min(allowed, key=lambda point: price_table(problem, point.table).total_s)
    return Draft(
        table=best.table,
        planner="local_search",
        reason=f"{best.moves} of at most {problem.move_budget} moves, those worth most first",
        termination=Termination.COMPLETED,
    )
