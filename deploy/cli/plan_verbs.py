"""`emoe plan` and `emoe evaluate`: they print and write results; optimizer/ makes them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.lines import counted, size_text
from elastic_moe.cluster.placement import Placement
from elastic_moe.cluster.setting import check_file
from elastic_moe.deploy.cli.plan_input import (
    choose_workers,
    describe,
    load_old,
    make_problem,
    move_budget,
    names_of,
    read_trace,
    same_experts,
    weights_of,
    write_text,
)
from elastic_moe.optimizer.core.cost import load_imbalance, shares
from elastic_moe.optimizer.core.result import PlanResult
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.study.traces import TraceError, concatenate


def run_plan(args: argparse.Namespace) -> int:
    """Plan for one trace, or for several subjects, and write the placement."""
    check_file(args.out)
    old = load_old(args)
    traces = same_experts([read_trace(args, path, old) for path in args.traces])
    trace = concatenate(traces)
    workers = choose_workers(args, old, trace.num_experts)
    problem = make_problem(args, traces[0], workers, old, others=traces[1:], weights=weights_of(args))
    problem = dataclasses.replace(problem, move_budget=move_budget(args, problem))
    if sys.stderr.isatty():
        print(f"{args.planner} plans for up to {args.deadline:g} s", file=sys.stderr, flush=True)
    result = plan(problem, planner=args.planner, deadline_s=args.deadline, solver=args.solver, seed=args.seed)
    if args.out is not None:
        write_text(args.out, json.dumps(result.placement.to_dict()))
    report = describe(trace, problem, result.placement) | _outcome(result)
    if len(traces) > 1:
        each = [describe(one, make_problem(args, one, workers, old), result.placement) for one in traces]
        report["scenarios"] = [
            {"trace": name, "load_imbalance": one["load_imbalance"], "step_cost": one["step_cost"]}
            for name, one in zip(names_of(args.traces), each, strict=True)
        ]
    if args.json:
        print(json.dumps(report))
        return 0
    print(_plan_text(report, result, args))
    if args.out is None:
        print("the placement is not written to a file; use --out NEW.json to keep it", file=sys.stderr)
    return 0


def _outcome(result: PlanResult) -> dict[str, Any]:
    return {
        "planner": result.planner,
        "status": str(result.status),
        "termination": str(result.termination),
        "step_cost_before": None if result.cost_before is None else result.cost_before.step_s,
        "load_imbalance_before": result.imbalance_before,
        "lower_bound": result.lower_bound,
        "gap": result.gap,
        "seconds": result.seconds,
        "reason": result.reason,
    }


def _plan_text(report: dict[str, Any], result: PlanResult, args: argparse.Namespace) -> str:
    asked = args.planner if result.planner == args.planner else f"{args.planner} (by {result.planner})"
    before = result.cost_before
    was = "" if before is None else f" (now {before.step_s * 1e6:.1f} us)"
    lines = [
        f"planner       {asked}: {result.status}, {result.termination}, {result.seconds:.2f} s",
        f"reason        {result.reason}",
        f"load          {report['load_imbalance']:.3f} max/mean",
        f"fan-out       {report['fan_out']:.3f} workers per token and layer",
        f"same worker   {report['same_worker_transitions']:.3f} of transitions",
        f"cross node    {report['cross_node_fraction']:.3f}",
        f"step cost     {report['step_cost'] * 1e6:.1f} us{was}: " + _items(report["cost"]),
        f"lower bound   {result.lower_bound * 1e6:.1f} us, gap {result.gap:.1%}",
        f"moves         {report['moves']} ({size_text(report['bytes'])})",
        *([f"tiers         {_tiers(report)}"] if "fetches" in report else []),
        *(
            f"on {one['trace']:10} {one['step_cost'] * 1e6:.1f} us, load {one['load_imbalance']:.3f} max/mean"
            for one in report.get("scenarios", [])
        ),
    ]
    return "\n".join(lines + ([f"written to    {args.out}"] if args.out else []))


def _tiers(report: dict[str, Any]) -> str:
    fetched = f"{report['fetches']:.1f} experts ({size_text(report['fetch_bytes'])})"
    return (
        f"{report['resident_share']:.0%} of the experts resident, {fetched} fetched in a step; "
        f"replayed: {report['replayed_miss_rate']:.1%} of accesses miss, a step waits for "
        f"{report['replayed_waits']:.1f} fetches one after another"
    )


def _items(cost: dict[str, float]) -> str:
    return ", ".join(f"{name.removesuffix('_s')} {seconds * 1e6:.1f}" for name, seconds in cost.items() if seconds)


def run_evaluate(args: argparse.Namespace) -> int:
    """Measure a placement on a trace."""
    placement, old = Placement.load(args.placement), load_old(args)
    trace = read_trace(args, args.trace, placement)
    if placement.num_layers != trace.num_layers:
        raise TraceError(
            f"{args.placement} is a placement of {counted(placement.num_layers, 'layer')}, {args.trace} has "
            f"{trace.num_layers}"
        )
    if args.workers not in (None, len(placement.workers)):
        raise ConfigError(f"--workers: {args.placement} is a placement on {len(placement.workers)}, got {args.workers}")
    problem = make_problem(args, trace, placement.workers, old)
    report = describe(trace, problem, placement)
    if problem.tiering is None and not placement.all_resident:
        print(f"{args.placement} has experts outside of devices; --device-experts prices them", file=sys.stderr)
    # the trace's own metric knows no speeds, so it is replaced where the user gives speeds
    if args.speeds:
        x = shares(problem, placement.physical_to_logical_map)
        report["load_imbalance"] = float(load_imbalance(problem, x).mean())
    if args.json:
        print(json.dumps(report))
        return 0
    for name in ("load_imbalance", "fan_out", "same_worker_transitions", "cross_node_fraction"):
        print(f"{name:24} {report[name]:.4f}")
    print(f"{'step_cost':24} {report['step_cost'] * 1e6:.1f} us: {_items(report['cost'])}")
    print(f"{'moves':24} {report['moves']} ({size_text(report['bytes'])})")
    if "fetches" in report:
        print(f"{'tiers':24} {_tiers(report)}")
    return 0
