"""Lower bounds on the cost of every placement of a problem. Cheap, and valid whatever a planner did."""

from __future__ import annotations

import numpy as np

from optimizer.problem import FloatArray, PlacementProblem


def lower_bound(problem: PlacementProblem) -> float:
    """Seconds per step that no placement can beat: an even split of the load, without any traffic."""
    return float(compute_bound(problem).sum())


def compute_bound(problem: PlacementProblem) -> FloatArray:
    """[L] seconds: no worker ends before an even split would."""
    ideal = problem.loads.sum(axis=1) / problem.speed.sum()
    return np.asarray(problem.token_expert_s * problem.scale * ideal)
