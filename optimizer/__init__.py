"""Decides where experts should sit: one cost model, many planners, and a simulator. Needs neither Ray nor torch.

    from elastic_moe.optimizer import PlacementProblem, plan

planner     plan(problem) -> PlanResult: the one entry point, with every planner by name
auto        the planner `auto`, which is no worse than any other
drift       re-placement from a placement in force, within a budget of moves
relief      the planner `relief`: the few swaps that answer a change of subject at once
decision    the rule whether a re-placement is worth its moves; production and the simulator share it
constants   the cost model's constants as they were measured, and their fit
subjects    what changes of the traffic's subject ask of a placement
core        the problem, its price, and what planners share
buffering   which experts stay in a cache that is too small for all
residency   what it costs that a worker's fast memory is too small for its experts
search      the planner `local_search`
ilp         the planner `ilp`
baselines   planners from the literature, and simple rules
study       traces, comparisons and simulations

The routing statistics are counted elsewhere (cluster/facts/routing.py), and so are placements carried out
(actors/coordinator).
"""

from elastic_moe.optimizer.core.problem import Links, PlacementProblem, Semantics
from elastic_moe.optimizer.core.result import PlanResult, SolutionStatus, Termination
from elastic_moe.optimizer.decision import Decision, Policy, decide
from elastic_moe.optimizer.planner import PLANNERS, check_planner, plan

__all__ = [
    "PLANNERS",
    "Decision",
    "Links",
    "PlacementProblem",
    "PlanResult",
    "Policy",
    "Semantics",
    "SolutionStatus",
    "Termination",
    "check_planner",
    "decide",
    "plan",
]
