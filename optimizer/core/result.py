"""What a planner answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from elastic_moe.cluster.placement import Placement
from elastic_moe.optimizer.core.cost import Cost


class SolutionStatus(StrEnum):
    """What is known of the placement, apart from why the planner stopped."""

    OPTIMAL = "optimal"
    """Proven: cost and lower bound agree."""
    FEASIBLE = "feasible"
    """Valid and priced; the gap says how far it may be from the best."""
    FALLBACK = "fallback"
    """Valid, but made by greedy because the wanted planner failed; the reason says why."""


class Termination(StrEnum):
    """Why the planner stopped."""

    COMPLETED = "completed"
    """The method ran to its end."""
    DEADLINE = "deadline"
    """Time ran out; the best placement found until then is returned."""
    SOLVER_FAILED = "solver_failed"
    """A solver was missing, refused the model, or broke."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """A placement, what it is predicted to cost, and how good it is known to be."""

    planner: str
    """Who made it: the planner that was asked for, the best one under `auto`, or greedy as the fallback."""
    placement: Placement
    status: SolutionStatus
    termination: Termination
    cost_before: Cost | None
    """Of the current placement; None without one, or where its workers are not the problem's."""
    cost: Cost
    imbalance_before: float | None
    """Mean over layers of the slowest worker's load over an even split; None as for `cost_before`."""
    imbalance: float
    lower_bound: float
    """Seconds per step that no placement of this problem can beat."""
    gap: float
    """(total cost - lower bound) / total cost; 0 is proven optimal."""
    seconds: float
    moves: int
    """Experts that workers must fetch to get there from the current placement; 0 without one."""
    bytes: int
    """Of those moves."""
    reason: str
    """One line for people."""
