"""Slot tables: the form in which planners build placements.

A table is [L, S] int32: the expert in each slot, or EMPTY. A worker's slots are consecutive (cluster.placement).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from elastic_moe.cluster.placement import EMPTY, Placement
from elastic_moe.optimizer.core.cost import held_before, shares
from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem
from elastic_moe.optimizer.core.tiering import LevelArray, tiers_of_table


def to_placement(
    problem: PlacementProblem, table: IntArray, levels: LevelArray | None = None, *, pin_all: bool = False
) -> Placement:
    """The verified placement of a table, with the tiers that `levels` say, or the best ones. With `pin_all` it has
    no cache area beyond the slot for those that pass. Raises PlacementError where the table breaks a rule."""
    familiar = _in_familiar_slots(problem, table)
    placement = Placement(
        num_logical_experts=problem.num_experts, workers=problem.workers, physical_to_logical_map=familiar
    )
    if problem.tiering is None:
        return placement
    x = shares(problem, familiar)
    found = problem.tiering.levels(x) if levels is None else levels
    marks = found if pin_all else problem.tiering.marks(x, found, held_before(problem))
    return replace(placement, tiers=tiers_of_table(problem, familiar, marks))


def row_of(problem: PlacementProblem, held: Sequence[Sequence[int]]) -> IntArray:
    """[S] the slots of one layer, made of the experts that each worker holds."""
    row: list[int] = []
    for worker, experts in zip(problem.workers, held, strict=True):
        assert len(experts) <= worker.slots
        row += [*experts, *[EMPTY] * (worker.slots - len(experts))]
    return np.array(row, dtype=np.int32)


def room(problem: PlacementProblem) -> list[int]:
    """[W] number of experts of one layer that each worker can hold: its slots, but no expert twice."""
    return [min(worker.slots, problem.num_experts) for worker in problem.workers]


def _in_familiar_slots(problem: PlacementProblem, table: IntArray) -> IntArray:
    """The same table, where every expert that stays on its worker keeps its present slot."""
    current = problem.current
    if current is None or current.workers != problem.workers:
        return table
    old, new = current.physical_to_logical_map, table.copy()
    start = 0
    for worker in problem.workers:
        end = start + worker.slots
        for was, now in zip(old[:, start:end], new[:, start:end], strict=True):
            stays = (was != EMPTY) & np.isin(was, now)
            others = now[~np.isin(now, was[stays])]
            now[stays] = was[stays]
            now[~stays] = others
        start = end
    return new
