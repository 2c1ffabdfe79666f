"""Makes a PlacementProblem of a trace and a description of a cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.placement import Placement, Worker, WorkerId
from elastic_moe.optimizer.core.problem import DEFAULT_STEP_TOKENS, Links, PlacementProblem, Semantics
from elastic_moe.optimizer.residency.memory import WorkerMemory
from elastic_moe.optimizer.study.mixes import count_mix
from elastic_moe.optimizer.study.traces import Trace

MOST_WORKERS = 100_000
"""Largest number of workers. A larger one is a mistake, and its lists would take all memory."""


def make_workers(number: int, *, nodes: int, num_experts: int, redundant: int = 0) -> tuple[Worker, ...]:
    """`number` workers spread evenly over `nodes` nodes, with just the slots for all experts and `redundant` replicas.

    Where the slots do not divide evenly, some workers, evenly spread, have one slot more. Every worker has at least
    one.

    Raises PlacementError for impossible numbers.
    """
    if not 1 <= number <= MOST_WORKERS:
        raise PlacementError(f"workers: expected 1 to {MOST_WORKERS}, got {number}")
    if not 1 <= nodes <= number:
        raise PlacementError(f"nodes: expected 1 to {number} (the workers), got {nodes}")
    most = (number - 1) * num_experts
    if not 0 <= redundant <= most:
        raise PlacementError(f"redundant: expected 0 to {most} (every expert on every worker), got {redundant}")
    total = num_experts + redundant
    slots = [(rank + 1) * total // number - rank * total // number for rank in range(number)]
    return tuple(
        Worker(id=WorkerId(f"w{rank}"), node=f"n{rank * nodes // number}", slots=min(max(slots[rank], 1), num_experts))
        for rank in range(number)
    )


def problem_from_trace(
    trace: Trace,
    workers: Sequence[Worker],
    *,
    others: Sequence[Trace] = (),
    weights: Sequence[float] = (),
    semantics: Semantics = Semantics.HOME,
    current: Placement | None = None,
    links: Links | None = None,
    expert_bytes: int = 0,
    horizon_steps: float = 10_000.0,
    speeds: tuple[float, ...] = (),
    node_cores: float = math.inf,
    memory: tuple[WorkerMemory, ...] = (),
    tokens_per_step: int = DEFAULT_STEP_TOKENS,
    dealt: bool = False,
) -> PlacementProblem:
    """The problem of placing the trace's experts on `workers`. `others` are further subjects that the placement must
    serve; `weights` say how much each counts, the trace's own first (all the same if not given)."""
    counted = count_mix([trace, *others], weights)
    return PlacementProblem(
        loads=counted.loads,
        transitions=counted.transitions,
        coactivation=counted.coactivation,
        load_covariance=counted.load_covariance,
        scenario_loads=counted.scenario_loads,
        scenario_weights=tuple(weights) if others else (),
        top_k=counted.top_k,
        workers=tuple(workers),
        speeds=speeds,
        node_cores=node_cores,
        links=links or Links(),
        current=current,
        expert_bytes=expert_bytes,
        horizon_steps=horizon_steps,
        semantics=semantics,
        memory=memory,
        tokens_per_step=tokens_per_step,
        dealt=dealt,
    )
