"""`emoe compare` and `emoe simulate`: they write tables and figures; optimizer/ makes the plans."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.lines import counted, meant, size_text
from elastic_moe.cluster.placement import Placement, Worker
from elastic_moe.deploy.cli.plan_input import (
    choose_workers,
    load_old,
    make_folder,
    make_problem,
    move_budget,
    move_share,
    names_of,
    read_trace,
    same_experts,
    weights_of,
    write_text,
)
from elastic_moe.deploy.tiers.caches import line_of, run_cache, save
from elastic_moe.optimizer.core.contract import Budget
from elastic_moe.optimizer.core.cost import copies
from elastic_moe.optimizer.core.problem import Links, PlacementProblem, Semantics
from elastic_moe.optimizer.core.result import PlanResult
from elastic_moe.optimizer.drift import frontier
from elastic_moe.optimizer.planner import PLANNERS, plan
from elastic_moe.optimizer.study.caches import CacheRow
from elastic_moe.optimizer.study.compare import Row, behind_on_unseen, compare, markdown, write_csv
from elastic_moe.optimizer.study.simulate import Look, SimulationSettings, simulate
from elastic_moe.optimizer.study.traces import Trace, TraceError, concatenate, load_trace

KEPT = "--out DIR keeps the table and the figures"


def run_compare(args: argparse.Namespace) -> int:
    """Run planners on a trace, and write table.csv, table.md and figures."""
    names = _planner_names(args.planners)
    old = load_old(args)
    profiles, tests = _read_compared(args, old)
    workers = choose_workers(args, old, profiles[0].num_experts)
    problem = make_problem(args, profiles[0], workers, old, others=profiles[1:], weights=weights_of(args))
    # what is measured is what comes on average, and no tail
    test_problem = dataclasses.replace(make_problem(args, tests[0], workers, old, others=tests[1:]), tail=0.0)
    limited = dataclasses.replace(problem, move_budget=move_budget(args, problem))
    each = {}
    if len(paths := [args.trace, *args.scenarios, *args.tests]) > 1:
        traces = [*profiles, *tests] if args.tests else tests
        each = {name: make_problem(args, one, workers, old) for name, one in zip(names_of(paths), traces, strict=True)}
    make_folder(args.out)

    def progress(row: Row) -> None:
        if args.json:
            print(json.dumps(dataclasses.asdict(row)), flush=True)
        else:
            print(f"{row.planner:16} {row.seconds:6.2f} s  {row.reason}", file=sys.stderr, flush=True)

    answers = compare(
        limited,
        concatenate(tests),
        test_problem,
        names,
        subjects=each,
        deadline_s=args.deadline,
        solver=args.solver,
        seed=args.seed,
        progress=progress,
    )
    rows = [row for row, _ in answers]
    write_csv(args.out / "table.csv", rows)
    table = markdown(rows)
    if limited.move_budget is not None:
        most = counted(limited.move_budget, "expert")
        table += f"\n`auto` moves at most {most} (--move-share); the others are not limited.\n"
    if args.tests and each:
        note = behind_on_unseen(rows, seen=names_of(paths)[: 1 + len(args.scenarios)])
        table += f"\n{note}" if note else ""
    write_text(args.out / "table.md", table)
    drawn = _draw_comparison(args, problem, test_problem, answers)
    if not args.json:
        print(table, end="")
        made = "table.csv, table.md and figures" if drawn else "table.csv and table.md"
        print(f"{made} are in {args.out}", file=sys.stderr)
    return 0


def _read_compared(args: argparse.Namespace, old: Placement | None) -> tuple[list[Trace], list[Trace]]:
    """The traces that the planners see, and those that are measured on."""
    seen = [read_trace(args, path, old) for path in (args.trace, *args.scenarios)]
    if not args.tests:
        halves = [trace.halves() for trace in same_experts(seen)]
        return [first for first, _ in halves], [second for _, second in halves]
    experts = args.experts or (None if old is None else old.num_logical_experts)
    tests = [load_trace(path, experts) for path in args.tests]
    for path, trace in zip([*args.scenarios, *args.tests], [*seen[1:], *tests], strict=True):
        if (trace.num_layers, trace.top_k) != (seen[0].num_layers, seen[0].top_k):
            raise TraceError(
                f"{path} and {args.trace} are of different models: their layers or experts per token differ"
            )
    traces = same_experts([*seen, *tests])
    return traces[: len(seen)], traces[len(seen) :]


def _planner_names(given: str) -> list[str]:
    names = list(PLANNERS) if given == "all" else [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in PLANNERS]
    if unknown or not names:
        first = unknown[0] if unknown else given
        raise ConfigError(
            f"--planners: expected all, or some of {', '.join(PLANNERS)}, got {first!r}{meant(first, PLANNERS)}"
        )
    return names


def _draw_comparison(
    args: argparse.Namespace,
    problem: PlacementProblem,
    test_problem: PlacementProblem,
    answers: list[tuple[Row, PlanResult]],
) -> bool:
    from elastic_moe.optimizer.study import figures

    rows = [row for row, _ in answers]

    def draw() -> None:
        figures.load_heat_map(args.out / "load.png", test_problem, answers)
        figures.pareto(args.out / "pareto.png", rows, problem.semantics)
        figures.solve_times(args.out / "seconds.png", rows)
        if problem.current is not None and problem.current.workers == problem.workers:
            # for comparison: a plan that ignores the placement in force
            scratch = plan(dataclasses.replace(problem, current=None), deadline_s=args.deadline, solver=args.solver)
            table = scratch.placement.physical_to_logical_map
            points = frontier(problem, Budget.of(args.deadline, seed=args.seed))
            full = (copies(problem, table), scratch.cost.step_s)
            figures.gain_curve(args.out / "gain.png", points, problem.expert_bytes, full)

    return _drawn(draw)


def _drawn(draw: Callable[[], None]) -> bool:
    """Run `draw`. Where matplotlib is missing, print a line and go on, because the tables are useful without figures.
    Returns whether figures were drawn."""
    try:
        draw()
    except ConfigError as error:
        print(f"emoe: no figures: {error}", file=sys.stderr)
        return False
    return True


def run_simulate(args: argparse.Namespace) -> int:
    """Serve traces on a virtual clock, and re-place experts as the server would; with --cache, replay them through
    caches of experts."""
    old = load_old(args)
    traces = same_experts([read_trace(args, path, old) for path in args.traces])
    if args.out is not None:
        make_folder(args.out)
    experts, trace = traces[0].num_experts, concatenate(traces)
    if args.cache:
        return _replay_caches(args, trace, choose_workers(args, old, experts))
    settings = SimulationSettings(
        planner=args.planner,
        solver=args.solver,
        deadline_s=args.deadline,
        interval_s=args.interval,
        window_s=args.window,
        tokens_per_s=args.rate,
        move_share=move_share(args),
        semantics=Semantics(args.semantics),
        links=Links(worker_gbps=args.worker_gbps, node_gbps=args.node_gbps),
        expert_bytes=args.expert_bytes,
        horizon_steps=args.horizon,
        seed=args.seed,
    )

    def progress(look: Look) -> None:
        if not args.json:
            mark = "change" if look.changed else "stay"
            load = f"load {look.imbalance:.3f} max/mean ({look.imbalance_static:.3f} without changes)"
            print(f"{look.time_s:8.0f} s  {load}  {mark}: {look.reason}", flush=True)

    looks = simulate(trace, choose_workers(args, old, experts), settings, first=old, progress=progress)
    if args.out is not None:
        write_text(args.out / "looks.json", json.dumps([dataclasses.asdict(look) for look in looks], indent=1))
        from elastic_moe.optimizer.study import figures

        drawn = _drawn(lambda: figures.imbalance_over_time(args.out / "imbalance.png", looks))
    ends = dict(zip(names_of(args.traces), np.cumsum([each.num_tokens for each in traces]), strict=True))
    summary = _summary(looks) | {"traces": _by_trace(looks, ends, settings)}
    print(json.dumps(summary) if args.json else _simulation_text(summary, settings.interval_s))
    if args.out is not None:
        print(f"{'looks.json and imbalance.png are' if drawn else 'looks.json is'} in {args.out}", file=sys.stderr)
    elif not args.json:
        print(f"nothing is written to a file; {KEPT}", file=sys.stderr)
    return 0


def _replay_caches(args: argparse.Namespace, trace: Trace, workers: tuple[Worker, ...]) -> int:
    def progress(row: CacheRow) -> None:
        print(json.dumps(dataclasses.asdict(row)) if args.json else line_of(row), flush=True)

    rows = run_cache(args, trace, workers, progress)
    if len({row.share for row in rows if row.share < 1}) <= 1:
        # the default number of workers suits larger models than the built-in one
        told = "a worker has so few experts of a layer that all policies are alike: take fewer --workers"
        print(told, file=sys.stderr)
    if args.out is None and not args.json:
        print(f"nothing is written to a file; {KEPT}", file=sys.stderr)
    if args.out is not None:
        drawn = save(args.out, rows, _drawn)
        print(f"caches.csv {'and figures are' if drawn else 'is'} in {args.out}", file=sys.stderr)
    return 0


def _summary(looks: list[Look]) -> dict[str, Any]:
    count = len(looks)
    return {
        "intervals": count,
        "changes": sum(look.changed for look in looks),
        "load_imbalance": sum(look.imbalance for look in looks) / count,
        "load_imbalance_static": sum(look.imbalance_static for look in looks) / count,
        "fan_out": sum(look.fan_out for look in looks) / count,
        "fan_out_static": sum(look.fan_out_static for look in looks) / count,
        "moves": sum(look.moves for look in looks),
        "bytes": sum(look.bytes for look in looks),
    }


def _by_trace(looks: list[Look], ends: dict[str, int], settings: SimulationSettings) -> list[dict[str, Any]]:
    """Seconds per step on each trace, on average over its intervals; an interval belongs to the trace of its middle."""
    middles = [(look.time_s - settings.interval_s / 2) * settings.tokens_per_s for look in looks]
    found, begin = [], 0
    for name, end in ends.items():
        mine = [look for look, middle in zip(looks, middles, strict=True) if begin <= middle < end]
        begin = end
        if mine:
            cost = sum(look.step_cost for look in mine) / len(mine)
            static = sum(look.step_cost_static for look in mine) / len(mine)
            found.append({"trace": name, "step_cost": cost, "step_cost_static": static})
    return found


def _simulation_text(summary: dict[str, Any], interval_s: float) -> str:
    lines = [
        f"on {each['trace']}: a step costs {each['step_cost'] * 1e6:.1f} us against "
        f"{each['step_cost_static'] * 1e6:.1f} us without changes"
        for each in summary["traces"]
    ]
    return "\n".join([_simulation_line(summary, interval_s), *lines])


def _simulation_line(summary: dict[str, Any], interval_s: float) -> str:
    return (
        f"{counted(summary['intervals'], 'interval')} of {interval_s:g} s, {counted(summary['changes'], 'change')}, "
        f"{counted(summary['moves'], 'move')} ({size_text(summary['bytes'])}); load {summary['load_imbalance']:.3f} "
        f"max/mean against {summary['load_imbalance_static']:.3f} without changes, fan-out {summary['fan_out']:.2f} "
        f"workers per token and layer against {summary['fan_out_static']:.2f}"
    )
