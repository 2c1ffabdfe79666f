"""Re-placement from a placement in force: the gain of each moved byte, and the best plan within a budget of moves.

The price of a move begins so high that little moves, and is lowered step by step. Every price gives one plan, and all
plans together are the curve of gain against bytes. Swaps that pay only at a low price come late, so the first moves on
the curve gain most.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.lines import counted
from elastic_moe.optimizer.core.contract import Budget, Draft
from elastic_moe.optimizer.core.cost import copies, held_before, price_table, shares
from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem
from elastic_moe.optimizer.core.result import Termination
from elastic_moe.optimizer.core.tiering import Tiering
from elastic_moe.optimizer.relief import relieved
from elastic_moe.optimizer.search.layer_prices import LayerPricer
from elastic_moe.optimizer.search.local_search import FROM_CURRENT, JointSearch

BISECTIONS = 6
"""Number of prices that are tried between the last one that moves too little and the first one that moves too much."""

PRICES = 14
"""Number of prices of a move, from the highest at which anything moves down to nearly 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrontierPoint:
    """One plan on the curve."""

    table: IntArray
    """[L, S]"""
    moves: int
    step_s: float
    """Seconds per step under this plan, without migration."""


def frontier(problem: PlacementProblem, budget: Budget, most_moves: int | None = None) -> list[FrontierPoint]:
    """Plans from the current placement, by ascending moves; the first plan is to stay. It ends where `most_moves` is
    exceeded.

    Raises PlacementError where there is no current placement of the problem's workers.
    """
    current = problem.current
    if current is None or current.workers != problem.workers:
        raise PlacementError("current: a placement of the same workers is needed to weigh moves against gain")
    points = [_point(problem, current.physical_to_logical_map)]
    stay_s, before_s = points[0].step_s, float("inf")
    for k, price_s in enumerate(np.geomspace(stay_s / problem.num_layers / 4, stay_s * 1e-6, PRICES)):
        part = budget.share(1 / (PRICES - k + (BISECTIONS if most_moves is not None else 0)))
        point = _improved(problem, points[-1], float(price_s), part)
        if most_moves is not None and point.moves > most_moves:
            points += _filled(problem, points[-1], point, (before_s, float(price_s)), most_moves, budget)
            break
        points.append(point)
        before_s = float(price_s)
        if budget.left_s <= 0:
            break
    return sorted(points, key=lambda p: (p.moves, p.step_s))


def _point(problem: PlacementProblem, table: IntArray) -> FrontierPoint:
    return FrontierPoint(table=table, moves=copies(problem, table), step_s=price_table(problem, table).step_s)


def _improved(problem: PlacementProblem, start: FrontierPoint, price_s: float, budget: Budget) -> FrontierPoint:
    """The plan that improves `start` where a move costs `price_s` seconds per step."""
    priced = dataclasses.replace(problem, expert_bytes=_bytes_for(problem, price_s))
    search = JointSearch(priced, start.table)
    search.sweep(budget, FROM_CURRENT)
    return _point(problem, search.table.copy())


def _filled(
    problem: PlacementProblem,
    under: FrontierPoint,
    over: FrontierPoint,
    prices: tuple[float, float],
    most: int,
    budget: Budget,
) -> list[FrontierPoint]:
    """Plans of at most `most` moves between `under` and `over`, which were found at the two `prices` of a move.

    The prices between are bisected, and a plan that moves too much is trimmed.
    """
    points, (high, low) = [_trimmed(problem, over, most)], prices
    for k in range(BISECTIONS):
        if budget.left_s <= 0 or under.moves >= most:
            break
        middle = min(high, 4 * low) ** 0.5 * low**0.5
        point = _improved(problem, under, middle, budget.share(1 / (BISECTIONS - k)))
        if point.moves > most:
            low = middle
            points.append(_trimmed(problem, point, most))
        else:
            high, under = middle, point
            points.append(point)
    return points


def _bytes_for(problem: PlacementProblem, price_s: float) -> int:
    """The size of an expert at which one move costs `price_s` seconds per step."""
    unit = dataclasses.replace(problem, expert_bytes=10**9)
    from elastic_moe.optimizer.core.cost import move_price

    return max(int(10**9 * price_s / move_price(unit)), 1)


def _trimmed(problem: PlacementProblem, point: FrontierPoint, most: int) -> FrontierPoint:
    """Return whole layers to the current placement, those with the least gain per move first, until at most `most`
    experts move."""
    assert problem.current is not None
    old, table = problem.current.physical_to_logical_map, point.table.copy()
    unpriced = dataclasses.replace(problem, expert_bytes=0)
    pricer = LayerPricer(unpriced, table)
    moves = {int(layer): _moves_of(problem, table, int(layer)) for layer in np.flatnonzero((table != old).any(axis=1))}
    left = sum(moves.values())
    worth = {layer: _worth(pricer, table, old, layer) for layer in moves}
    while left > most:
        layer = min(moves, key=lambda each: (worth[each] / max(moves[each], 1e-9), each))
        table[layer] = old[layer]
        pricer.update(table, layer)
        left -= moves.pop(layer)
        worth |= {near: _worth(pricer, table, old, near) for near in (layer - 1, layer + 1) if near in moves}
    return _point(problem, table)


def _moves_of(problem: PlacementProblem, table: IntArray, layer: int) -> int:
    assert problem.current is not None
    alone = problem.current.physical_to_logical_map.copy()
    alone[layer] = table[layer]
    return copies(problem, alone)


def _worth(pricer: LayerPricer, table: IntArray, old: IntArray, layer: int) -> float:
    """Seconds per step that the moves of one layer save while the other layers stay."""
    new, with_s = table[layer].copy(), pricer.around_s(layer)
    table[layer] = old[layer]
    pricer.update(table, layer)
    without_s = pricer.around_s(layer)
    table[layer] = new
    pricer.update(table, layer)
    return without_s - with_s


def within_budget(problem: PlacementProblem, budget: Budget) -> Draft:
    """The best plan that moves at most `problem.move_budget` experts."""
    assert problem.move_budget is not None
    if problem.tiering is not None:
        return _within_tiers(problem, problem.tiering, budget)
    points = [_relief(problem, budget), *frontier(problem, budget, problem.move_budget)]
    allowed = [point for point in points if point.moves <= problem.move_budget]
    best = min(allowed, key=lambda point: price_table(problem, point.table).total_s)
    return Draft(
        table=best.table,
        planner="local_search",
        reason=f"{best.moves} of at most {counted(problem.move_budget, 'move')}, the most valuable ones first",
        termination=Termination.COMPLETED,
    )


def _relief(problem: PlacementProblem, budget: Budget) -> FrontierPoint:
    """The swaps that take most off the busiest workers. They take milliseconds, so they count where the deadline leaves
    the search no time to get as far."""
    assert problem.current is not None
    assert problem.move_budget is not None
    # whatever the deadline
    unhurried = dataclasses.replace(budget, ends=math.inf)
    table, _ = relieved(problem, problem.current.physical_to_logical_map, problem.move_budget // 2, unhurried)
    return _point(problem, table)


def _within_tiers(problem: PlacementProblem, tiering: Tiering, budget: Budget) -> Draft:
    """The best plan that brings at most `problem.move_budget` experts into devices. An expert that another worker
    serves from its disk needs no move, so every table on the curve is possible, with tiers that keep to the budget."""
    assert problem.move_budget is not None
    before = held_before(problem)
    assert before is not None
    drafts = []
    for table in [point.table for point in frontier(problem, budget)]:
        levels = tiering.levels_within(shares(problem, table), before, problem.move_budget)
        drafts.append((price_table(problem, table, levels).total_s, table, levels))
    _, table, levels = min(drafts, key=lambda draft: draft[0])
    moves = copies(problem, table, levels)
    return Draft(
        table=table,
        levels=levels,
        planner="local_search",
        reason=f"{moves} of at most {problem.move_budget} experts come into devices, the most valuable ones first",
        termination=Termination.COMPLETED,
    )
