"""The quick planners by name: the function that makes the table, and the reason that the result gives.

`plan()` offers them, and `auto` compares its own table with each of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from elastic_moe.optimizer.baselines.eplb import eplb_table
from elastic_moe.optimizer.baselines.heuristics import (
    anticorrelation_table,
    contiguous_table,
    greedy_table,
    random_table,
    round_robin_table,
)
from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickPlanner:
    """A planner that needs milliseconds for a layer, and no deadline."""

    make_table: Callable[[PlacementProblem, np.random.Generator], IntArray]
    """It returns a slot table [L, S]."""
    reason: str


QUICK_PLANNERS: dict[str, QuickPlanner] = {
    "contiguous": QuickPlanner(make_table=contiguous_table, reason="experts in order"),
    "round_robin": QuickPlanner(make_table=round_robin_table, reason="experts dealt in turn"),
    "random": QuickPlanner(make_table=random_table, reason="experts dealt at random"),
    "greedy": QuickPlanner(make_table=greedy_table, reason="heaviest expert first, to the worker that ends earliest"),
    "anticorrelation": QuickPlanner(
        make_table=anticorrelation_table, reason="greedy, with experts that peak together kept apart"
    ),
    "eplb": QuickPlanner(make_table=eplb_table, reason="spare slots to the heaviest experts, then balanced packing"),
}
