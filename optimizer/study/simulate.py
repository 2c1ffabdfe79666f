"""Replays a trace through the production code on a virtual clock, to see what re-placement would have gained.

The window (cluster.facts.routing.RoutingWindow), the planner (optimizer.plan) and the rule whether to act
(optimizer.decide) are those of the server; only the clock and the tokens are simulated. Planning takes no virtual time,
and a new placement serves from the next interval on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from elastic_moe.cluster.facts.routing import RoutingWindow
from elastic_moe.cluster.facts.sampling import as_choices
from elastic_moe.cluster.messages.epochs import PhaseCounts, RoutingCounts
from elastic_moe.cluster.placement import Placement, Worker, contiguous
from elastic_moe.optimizer.core.cost import price
from elastic_moe.optimizer.core.estimate import expected_covariance
from elastic_moe.optimizer.core.problem import Links, PlacementProblem, Semantics
from elastic_moe.optimizer.core.result import PlanResult
from elastic_moe.optimizer.decision import MOVE_SHARE, Policy, decide
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.study.metrics import measure
from elastic_moe.optimizer.study.scenario import problem_from_trace
from elastic_moe.optimizer.study.traces import Trace, TraceError
from elastic_moe.optimizer.subjects.memory import SubjectMemory, scenarios


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """The settings of the simulated server."""

    planner: str = "auto"
    solver: str = "highs"
    deadline_s: float = 2.0
    """Real seconds that the planner may take at each check."""
    interval_s: float = 60.0
    """Virtual seconds between two checks of the placement."""
    window_s: float = 300.0
    """Virtual seconds for which statistics are kept."""
    tokens_per_s: float = 20.0
    """Tokens of the trace that are served in a virtual second."""
    move_share: float | None = MOVE_SHARE
    """Largest share of all experts that one change moves; None sets no limit."""
    memory: bool = True
    """Whether placements are planned for the subjects that came before, too."""
    policy: Policy = field(default_factory=Policy)
    semantics: Semantics = Semantics.HOME
    links: Links = field(default_factory=Links)
    expert_bytes: int = 17_301_504
    horizon_steps: float = 10_000.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One interval of the simulation."""

    time_s: float
    """Virtual time at the end of the interval."""
    imbalance: float
    """Load imbalance of the interval's tokens under the placement that served them."""
    imbalance_static: float
    """Load imbalance of the same tokens under the first placement."""
    fan_out: float
    fan_out_static: float
    step_cost: float
    """Seconds per step for the interval's tokens under the placement that served them, without risk."""
    step_cost_static: float
    changed: bool
    moves: int
    bytes: int
    gain: float
    """Share of a step's cost that the plan at the end of the interval promises to save, after the cost of migration."""
    reason: str


def simulate(
    trace: Trace,
    workers: tuple[Worker, ...],
    settings: SimulationSettings,
    *,
    first: Placement | None = None,
    progress: Callable[[Look], None] | None = None,
) -> list[Look]:
    """Serve the trace, beginning with the placement `first` (contiguous if None). Blocks: planning takes real time.

    Raises TraceError where the trace is shorter than one interval.
    """
    per_look = int(settings.interval_s * settings.tokens_per_s)
    if per_look < 1 or trace.num_tokens < per_look:
        raise TraceError(f"trace: {trace.num_tokens} tokens are less than one interval of {per_look}")
    static = first or contiguous(trace.num_layers, trace.num_experts, workers)
    window = RoutingWindow(trace.num_layers, trace.num_experts, window_s=settings.window_s)
    memory, part = SubjectMemory(trace.num_layers, trace.num_experts), -1
    placement, changed_at, looks = static, None, []
    for begin in range(0, trace.num_tokens - per_look + 1, per_look):
        now = (begin + per_look) / settings.tokens_per_s
        served = _slice(trace, begin, begin + per_look)
        # a report arrives just before the check that reads it
        window.add(count_routing(served), now - 1e-6)
        for number, part_load in window.closed(part, now) if settings.memory else ():
            memory.add(part_load, now)
            part = number
        result = _plan(window, memory, placement, trace.top_k, settings, now)
        load = window.load(now)
        decision = decide(
            result,
            tokens_per_expert=float(load.mean()),
            since_change_s=None if changed_at is None else now - changed_at,
            policy=settings.policy,
        )
        here, there = measure(served, placement), measure(served, static)
        look = Look(
            time_s=now,
            imbalance=here.load_imbalance,
            imbalance_static=there.load_imbalance,
            fan_out=here.fan_out,
            fan_out_static=there.fan_out,
            step_cost=_step_cost(served, placement, settings),
            step_cost_static=_step_cost(served, static, settings),
            changed=decision.worthwhile,
            moves=result.moves if decision.worthwhile else 0,
            bytes=result.bytes if decision.worthwhile else 0,
            gain=decision.net_gain,
            reason=decision.reason,
        )
        if decision.worthwhile:
            placement, changed_at = result.placement, now
        looks.append(look)
        if progress is not None:
            progress(look)
    return looks


def _plan(
    window: RoutingWindow,
    memory: SubjectMemory,
    placement: Placement,
    top_k: int,
    settings: SimulationSettings,
    now: float,
) -> PlanResult:
    load, parts = window.load(now), window.load_parts(now)
    loads, each, weights = scenarios(load, memory.others(load, now))
    budget = None if settings.move_share is None else int(settings.move_share * load.size)
    problem = PlacementProblem(
        loads=loads,
        scenario_loads=each,
        scenario_weights=weights,
        transitions=window.sample(now).transitions(),
        load_covariance=expected_covariance(load, parts, memory.variation(now)),
        workers=placement.workers,
        top_k=top_k,
        current=placement,
        links=settings.links,
        semantics=settings.semantics,
        expert_bytes=settings.expert_bytes,
        horizon_steps=settings.horizon_steps,
        move_budget=budget,
    )
    return plan(
        problem,
        planner=settings.planner,
        solver=settings.solver,
        deadline_s=settings.deadline_s,
        seed=settings.seed,
    )


def _step_cost(served: Trace, placement: Placement, settings: SimulationSettings) -> float:
    problem = problem_from_trace(served, placement.workers, semantics=settings.semantics, links=settings.links)
    return price(problem, placement).realised_s


def _slice(trace: Trace, begin: int, end: int) -> Trace:
    """Tokens begin .. end - 1, with the requests, or parts of requests, that they belong to."""
    ends = np.cumsum(trace.request_lengths)
    inside = np.minimum(ends, end) - np.maximum(ends - trace.request_lengths, begin)
    return Trace(topk_ids=trace.topk_ids[begin:end], request_lengths=inside[inside > 0], num_experts=trace.num_experts)


def count_routing(trace: Trace) -> RoutingCounts:
    """The counts that workers would report for these tokens."""
    layers, experts, ids = trace.num_layers, trace.num_experts, trace.topk_ids.astype(np.int64)
    load = np.stack([np.bincount(ids[:, layer].ravel(), minlength=experts) for layer in range(layers)])
    counted = PhaseCounts(tokens=trace.num_tokens, load=load.astype(np.int64))
    none = PhaseCounts(tokens=0, load=np.zeros_like(counted.load))
    return RoutingCounts(prefill=none, decode=counted, sample=as_choices(trace.topk_ids, experts))
