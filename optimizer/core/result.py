"""The result of a planner: the placement, its cost, and how good it is known to be."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from elastic_moe.cluster.placement import Placement
from elastic_moe.optimizer.core.cost import Cost


class SolutionStatus(StrEnum):
    """How good the placement is known to be. Termination says why the planner stopped."""

    OPTIMAL = "optimal"
    """The placement is proven optimal: its cost equals the lower bound."""
    FEASIBLE = "feasible"
    """The placement is valid; the gap says how far it may be from the best one."""
    FALLBACK = "fallback"
    """The placement is valid, but greedy has made it because the planner failed; the reason says why."""


class Termination(StrEnum):
    """Why the planner stopped."""

    COMPLETED = "completed"
    """The method ran to its end."""
    DEADLINE = "deadline"
    """The time ran out; the result is the best placement found until then."""
    SOLVER_FAILED = "solver_failed"
    """A solver is missing, refused the model, or broke."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """A placement, what it is predicted to cost, and how good it is known to be."""

    planner: str
    """Name of the planner that has made it: the one that was asked, the best one under `auto`, or greedy as
    fallback."""
    placement: Placement
    status: SolutionStatus
    termination: Termination
    cost_before: Cost | None
    """Cost of the current placement; None without one, or where its workers are not the problem's."""
    cost: Cost
    each_before: tuple[float, ...]
    """Seconds per step of the current placement in each of the problem's scenarios, in their order; empty as
    `cost_before` is None."""
    each: tuple[float, ...]
    """Seconds per step in each of the problem's scenarios; the cost alone where the loads are the only one."""
    imbalance_before: float | None
    """Mean over layers of the slowest worker's load divided by an even split; None as for `cost_before`."""
    imbalance: float
    lower_bound: float
    """Seconds per step that no placement of this problem can beat."""
    gap: float
    """(total cost - lower bound) / total cost; at 0 the placement is proven optimal."""
    seconds: float
    moves: int
    """Number of experts that workers must fetch to get there from the current placement; 0 without one."""
    bytes: int
    """Bytes that those moves copy."""
    reason: str
    """Why the plan is as it is, in one line for people."""
