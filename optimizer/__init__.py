"""Where experts should sit: one cost model, many planners, and a simulator. Needs neither Ray nor torch.

problem     PlacementProblem: what is known when a placement is wanted
cost        the price of any placement, itemised
planner     plan(problem) -> PlanResult: the one entry point, with every planner by name
decision    is a re-placement worth its moves? The rule that production and simulator share

    from elastic_moe.optimizer import PlacementProblem, plan
"""

from elastic_moe.optimizer.core.problem import Links, PlacementProblem, Semantics
from elastic_moe.optimizer.core.result import PlanResult, SolutionStatus, Termination
from elastic_moe.optimizer.decision import Decision, Policy, decide
from elastic_moe.optimizer.planner import PLANNERS, plan

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
    "decide",
    "plan",
]
