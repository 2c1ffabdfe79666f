"""`emoe simulate --cache`: it replays traces through caches of experts and writes a table and figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from elastic_moe.cluster.placement import Placement, Worker
from elastic_moe.deploy.tiers.flags import fetch_s, step_tokens
from elastic_moe.optimizer.core.problem import PlacementProblem
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.study.caches import (
    CURVES,
    CacheRow,
    CacheTimes,
    WorkerSteps,
    cache_row,
    cache_sizes,
    write_rows,
)
from elastic_moe.optimizer.study.scenario import problem_from_trace
from elastic_moe.optimizer.study.traces import Trace

SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
"""Sizes of caches, as shares of the experts that a worker serves in a layer."""

PLACEMENTS = ("contiguous", "greedy", "anticorrelation")

BATCH = 8
"""Requests that are decoded at once, where --step-tokens does not say how many."""


def run_cache(
    args: argparse.Namespace, trace: Trace, workers: tuple[Worker, ...], progress: Callable[[CacheRow], None]
) -> list[CacheRow]:
    """Measure every policy, placement and size on the second half of the requests; the first half is the profile.

    Raises TraceError where there are too few requests.
    """
    profile, test = trace.halves()
    batch = step_tokens(args, BATCH)
    problem = problem_from_trace(profile, workers, expert_bytes=args.expert_bytes, tokens_per_step=batch)
    times = CacheTimes(
        compute_s=_compute_s(problem),
        fetch_s=fetch_s(args.disk_gbps, args.expert_bytes),
        expert_bytes=args.expert_bytes * trace.num_layers,
    )
    rows: list[CacheRow] = []
    # on one worker every placement is the same
    for name in PLACEMENTS if len(workers) > 1 else PLACEMENTS[:1]:
        seen = WorkerSteps(test, profile, _placement(problem, name), batch)
        # workers with few experts have the same caches for several shares
        for slots, _ in groupby(cache_sizes(seen, share) for share in SHARES):
            for policy in CURVES:
                rows.append(cache_row(seen, name, policy, slots, times))
                progress(rows[-1])
    return rows


def _placement(problem: PlacementProblem, name: str) -> Placement:
    return plan(problem, planner=name, deadline_s=10.0).placement


def _compute_s(problem: PlacementProblem) -> float:
    """Seconds of a layer where all experts are resident and the load is even."""
    return problem.token_expert_s * problem.tokens_per_step * problem.top_k / float(problem.speed.sum())


def line_of(row: CacheRow) -> str:
    """The row for people."""
    return (
        f"{row.placement:16} {row.policy:8} {row.share:6.1%} resident  miss rate {row.miss_rate:.3f} "
        f"(worst layer {row.worst_miss_rate:.3f})  {row.step_s * 1e3:9.3f} ms a step"
    )


def save(folder: Path, rows: list[CacheRow], drawn: Callable[[Callable[[], None]], bool]) -> bool:
    """Write caches.csv, and the figures where `drawn` can have them drawn. Returns whether it could."""
    write_rows(folder / "caches.csv", rows)
    from elastic_moe.optimizer.study import cache_figures

    def draw() -> None:
        cache_figures.miss_rates(folder / "miss_rates.png", rows)
        cache_figures.latency(folder / "latency.png", rows)

    return drawn(draw)
