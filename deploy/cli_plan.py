"""The verbs about placements: `emoe plan`, `evaluate`, `compare` and `simulate`. Parsing and printing only;
optimizer/ does the work.

They need neither a cluster nor a model: a routing trace and a description of the workers are enough.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.placement import Placement, Worker
from optimizer.compare import Row, compare, markdown, write_csv
from optimizer.cost import copies, load_imbalance, price, shares
from optimizer.draft import Budget
from optimizer.drift import frontier
from optimizer.metrics import measure
from optimizer.planner import PLANNERS, plan
from optimizer.problem import Links, PlacementProblem, Semantics
from optimizer.result import PlanResult
from optimizer.scenario import make_workers, problem_from_trace
from optimizer.simulate import Look, SimulationSettings, simulate
from optimizer.solvers import SOLVERS
from optimizer.traces import Trace, TraceError, concatenate, load_trace

DEFAULT_WORKERS = 8

DEFAULT_MOVE_SHARE = 0.18
"""Of all experts, for --from: about a quarter of what a plan from scratch moves, which gains some four fifths of it."""


def add_parsers(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verbs; each parser's `func` (and `run`) takes the parsed arguments and returns the exit code."""
    for name, add, function, what in (
        ("plan", _plan_arguments, run_plan, "plan where the experts of a traced model should sit"),
        ("evaluate", _evaluate_arguments, run_evaluate, "measure a placement on a trace"),
        ("compare", _compare_arguments, run_compare, "run many planners on a trace: table and figures"),
        ("simulate", _simulate_arguments, run_simulate, "replay traces through the re-placement decisions"),
    ):
        parser = subparsers.add_parser(name, help=what, description=what.capitalize() + ".", allow_abbrev=False)
        add(parser)
        parser.set_defaults(func=function, run=function)


# --- Arguments --------------------------------------------------------------------------------------------------


def _cluster_arguments(parser: argparse.ArgumentParser) -> None:
    links, problem = Links(), PlacementProblem.__dataclass_fields__
    parser.add_argument("--workers", type=int, metavar="N", help=f"workers ({DEFAULT_WORKERS}, or those of --from)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes that they are spread over (1)")
    parser.add_argument(
        "--redundant", type=int, default=0, metavar="N", help="replicas per layer, over all workers (0)"
    )
    parser.add_argument("--speeds", metavar="S,S,..", help="relative speed of each worker (all alike)")
    parser.add_argument("--experts", type=int, metavar="E", help="experts per layer (highest id in the trace + 1)")
    parser.add_argument(
        "--semantics", choices=[str(s) for s in Semantics], default="home", help="where tokens wait (home)"
    )
    parser.add_argument("--worker-gbps", type=float, default=links.worker_gbps, metavar="G", help="of a worker's port")
    parser.add_argument("--node-gbps", type=float, default=links.node_gbps, metavar="G", help="of a node's uplink")
    parser.add_argument(
        "--expert-bytes", type=int, default=17_301_504, metavar="B", help="of one expert (DeepSeek-V2-Lite's: 17301504)"
    )
    parser.add_argument(
        "--horizon",
        type=float,
        default=problem["horizon_steps"].default,
        metavar="STEPS",
        help="steps that a placement serves, over which moves are paid off (10000)",
    )


def _solving_arguments(parser: argparse.ArgumentParser, deadline_s: float) -> None:
    parser.add_argument(
        "--deadline", type=float, default=deadline_s, metavar="S", help=f"seconds to plan ({deadline_s:g})"
    )
    parser.add_argument("--solver", choices=SOLVERS, default="highs", help="ILP solver (highs)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")


def _from_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="old", type=Path, metavar="OLD.json", help="placement in force")
    parser.add_argument(
        "--move-share",
        type=float,
        metavar="SHARE",
        help=f"with --from: most experts to move, as a share of all ({DEFAULT_MOVE_SHARE}; 1: no limit)",
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=Path, metavar="TRACE.npz")
    _cluster_arguments(parser)
    parser.add_argument("--planner", choices=PLANNERS, default="auto", help="(auto)", metavar="NAME")
    _solving_arguments(parser, 10.0)
    _from_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="NEW.json", help="file for the placement")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=Path, metavar="TRACE.npz")
    parser.add_argument("placement", type=Path, metavar="PLACEMENT.json")
    _cluster_arguments(parser)
    parser.add_argument(
        "--from", dest="old", type=Path, metavar="OLD.json", help="count moves and bytes from this placement"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=Path, metavar="TRACE.npz", help="to profile on")
    parser.add_argument("test", type=Path, nargs="?", metavar="TEST.npz", help="to measure on; the trace's second half")
    _cluster_arguments(parser)
    parser.add_argument("--planners", default="all", metavar="A,B,..", help="names, or all (all)")
    _solving_arguments(parser, 10.0)
    _from_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the table and the figures")
    parser.add_argument("--json", action="store_true", help="print one JSON object per planner")


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    settings = SimulationSettings()
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE.npz", help="served one after another: drift")
    _cluster_arguments(parser)
    parser.add_argument("--planner", choices=PLANNERS, default="auto", help="(auto)", metavar="NAME")
    _solving_arguments(parser, settings.deadline_s)
    _from_arguments(parser)
    parser.add_argument(
        "--interval", type=float, default=settings.interval_s, metavar="S", help="virtual s between looks"
    )
    parser.add_argument("--window", type=float, default=settings.window_s, metavar="S", help="virtual s of statistics")
    parser.add_argument(
        "--rate", type=float, default=settings.tokens_per_s, metavar="TOK/S", help="tokens per virtual s"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the figure and the table")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


# --- What they share --------------------------------------------------------------------------------------------


def _workers(args: argparse.Namespace, old: Placement | None, num_experts: int) -> tuple[Worker, ...]:
    """Those of --from, unless --workers asks for others."""
    if args.workers is None and old is not None:
        return old.workers
    number = DEFAULT_WORKERS if args.workers is None else args.workers
    return make_workers(number, nodes=args.nodes, num_experts=num_experts, redundant=args.redundant)


def _speeds(args: argparse.Namespace) -> tuple[float, ...]:
    if args.speeds is None:
        return ()
    try:
        return tuple(float(speed) for speed in args.speeds.split(","))
    except ValueError:
        raise ConfigError(f"--speeds: expected numbers with commas between, got {args.speeds!r}") from None


def _old(args: argparse.Namespace) -> Placement | None:
    return None if args.old is None else Placement.load(args.old)


def _trace(args: argparse.Namespace, path: Path, *others: Placement | None) -> Trace:
    """A placement that is given knows the number of experts better than the ids that happen to occur."""
    known = next((placement.num_logical_experts for placement in others if placement is not None), None)
    return load_trace(path, args.experts or known)


def _problem(
    args: argparse.Namespace, trace: Trace, workers: tuple[Worker, ...], old: Placement | None
) -> PlacementProblem:
    return problem_from_trace(
        trace,
        workers,
        semantics=Semantics(args.semantics),
        current=old,
        links=Links(worker_gbps=args.worker_gbps, node_gbps=args.node_gbps),
        expert_bytes=args.expert_bytes,
        horizon_steps=args.horizon,
        speeds=_speeds(args),
    )


def _move_budget(args: argparse.Namespace, problem: PlacementProblem) -> int | None:
    if problem.current is None or problem.current.workers != problem.workers:
        return None
    share = DEFAULT_MOVE_SHARE if args.move_share is None else args.move_share
    if not 0 <= share <= 1:
        raise ConfigError(f"--move-share: expected 0 to 1, got {share}")
    return None if share == 1 else math.floor(share * problem.num_layers * problem.num_experts)


def _report(trace: Trace, problem: PlacementProblem, placement: Placement) -> dict[str, Any]:
    """The figures that every verb prints under the same names."""
    moves = copies(problem, placement.physical_to_logical_map)
    cost = price(problem, placement)
    return {
        **dataclasses.asdict(measure(trace, placement, problem.semantics)),
        "step_cost": cost.step_s,
        "cost": dataclasses.asdict(cost),
        "moves": moves,
        "bytes": moves * problem.expert_bytes,
    }


# --- Verbs ------------------------------------------------------------------------------------------------------


def run_plan(args: argparse.Namespace) -> int:
    """Plan for a trace, and write the placement."""
    old = _old(args)
    trace = _trace(args, args.trace, old)
    problem = _problem(args, trace, _workers(args, old, trace.num_experts), old)
    problem = dataclasses.replace(problem, move_budget=_move_budget(args, problem))
    result = plan(problem, planner=args.planner, deadline_s=args.deadline, solver=args.solver, seed=args.seed)
    if args.out is not None:
        _write(args.out, json.dumps(result.placement.to_dict()))
    report = _report(trace, problem, result.placement) | _outcome(result)
    if args.json:
        print(json.dumps(report))
        return 0
    print(_plan_text(report, result, args.out))
    if args.out is None:
        print("the placement is written nowhere: give --out NEW.json to keep it", file=sys.stderr)
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


def _plan_text(report: dict[str, Any], result: PlanResult, out: Path | None) -> str:
    before = result.cost_before
    was = "" if before is None else f" (now {before.step_s * 1e6:.1f} us)"
    lines = [
        f"planner       {result.planner}: {result.status}, {result.termination}, {result.seconds:.2f} s",
        f"reason        {result.reason}",
        f"load          {report['load_imbalance']:.3f} max/mean",
        f"fan-out       {report['fan_out']:.3f} workers per token and layer",
        f"same worker   {report['same_worker_transitions']:.3f} of transitions",
        f"cross node    {report['cross_node_fraction']:.3f}",
        f"step cost     {report['step_cost'] * 1e6:.1f} us{was}: " + _items(report["cost"]),
        f"lower bound   {result.lower_bound * 1e6:.1f} us, gap {result.gap:.1%}",
        f"moves         {report['moves']} ({report['bytes'] / 1e9:.2f} GB)",
    ]
    return "\n".join(lines + ([f"written to    {out}"] if out else []))


def _items(cost: dict[str, float]) -> str:
    return ", ".join(f"{name.removesuffix('_s')} {seconds * 1e6:.1f}" for name, seconds in cost.items() if seconds)


def run_evaluate(args: argparse.Namespace) -> int:
    """Measure a placement on a trace."""
    placement, old = Placement.load(args.placement), _old(args)
    trace = _trace(args, args.trace, placement)
    if placement.num_layers != trace.num_layers:
        raise TraceError(
            f"{args.placement} is a placement of {placement.num_layers} layers, {args.trace} has {trace.num_layers}"
        )
    problem = _problem(args, trace, placement.workers, old)
    report = _report(trace, problem, placement)
    # speeds are the problem's, not the trace's, so the metric is told with them only where they were given
    if args.speeds:
        x = shares(problem, placement.physical_to_logical_map)
        report["load_imbalance"] = float(load_imbalance(problem, x).mean())
    if args.json:
        print(json.dumps(report))
        return 0
    for name in ("load_imbalance", "fan_out", "same_worker_transitions", "cross_node_fraction"):
        print(f"{name:24} {report[name]:.4f}")
    print(f"{'step_cost':24} {report['step_cost'] * 1e6:.1f} us: {_items(report['cost'])}")
    print(f"{'moves':24} {report['moves']} ({report['bytes'] / 1e9:.2f} GB)")
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """Run planners on a trace, and write table.csv, table.md and figures."""
    names = _planner_names(args.planners)
    old = _old(args)
    profile = _trace(args, args.trace, old)
    if args.test is None:
        profile, test = profile.halves()
    else:
        test = load_trace(args.test, args.experts or (None if old is None else old.num_logical_experts))
        experts = max(profile.num_experts, test.num_experts)
        if (profile.num_layers, profile.top_k) != (test.num_layers, test.top_k):
            raise TraceError(f"{args.test} is not of the model of {args.trace}: layers or experts per token differ")
        profile, test = (dataclasses.replace(trace, num_experts=experts) for trace in (profile, test))
    workers = _workers(args, old, profile.num_experts)
    problem = _problem(args, profile, workers, old)
    test_problem = _problem(args, test, workers, old)
    limited = dataclasses.replace(problem, move_budget=_move_budget(args, problem))
    _make_folder(args.out)

    def progress(row: Row) -> None:
        if args.json:
            print(json.dumps(dataclasses.asdict(row)), flush=True)
        else:
            print(f"{row.planner:16} {row.seconds:6.2f} s  {row.reason}", file=sys.stderr, flush=True)

    answers = compare(
        limited,
        test,
        test_problem,
        names,
        deadline_s=args.deadline,
        solver=args.solver,
        seed=args.seed,
        progress=progress,
    )
    rows = [row for row, _ in answers]
    write_csv(args.out / "table.csv", rows)
    _write(args.out / "table.md", markdown(rows))
    _draw_comparison(args, problem, test_problem, answers)
    if not args.json:
        print(markdown(rows), end="")
        print(f"table.csv, table.md and figures are in {args.out}", file=sys.stderr)
    return 0


def _planner_names(given: str) -> list[str]:
    names = list(PLANNERS) if given == "all" else [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in PLANNERS]
    if unknown or not names:
        raise ConfigError(f"--planners: expected all, or some of {', '.join(PLANNERS)}, got {given!r}")
    return names


def _draw_comparison(
    args: argparse.Namespace,
    problem: PlacementProblem,
    test_problem: PlacementProblem,
    answers: list[tuple[Row, PlanResult]],
) -> None:
    from optimizer import figures

    rows = [row for row, _ in answers]

    def draw() -> None:
        figures.load_heat_map(args.out / "load.png", test_problem, answers)
        figures.pareto(args.out / "pareto.png", rows, problem.semantics)
        figures.solve_times(args.out / "seconds.png", rows)
        if problem.current is not None and problem.current.workers == problem.workers:
            # what a plan that forgets the placement in force would move and gain
            scratch = plan(dataclasses.replace(problem, current=None), deadline_s=args.deadline, solver=args.solver)
            table = scratch.placement.physical_to_logical_map
            points = frontier(problem, Budget.of(args.deadline, seed=args.seed))
            full = (copies(problem, table), scratch.cost.step_s)
            figures.gain_curve(args.out / "gain.png", points, problem.expert_bytes, full)

    _drawn(draw)


def _drawn(draw: Callable[[], None]) -> None:
    """Tables are worth having without figures: a missing matplotlib is told, not fatal."""
    try:
        draw()
    except ConfigError as error:
        print(f"emoe: no figures: {error}", file=sys.stderr)


def run_simulate(args: argparse.Namespace) -> int:
    """Serve traces on a virtual clock, re-placing experts as the server would."""
    old = _old(args)
    traces = [_trace(args, path, old) for path in args.traces]
    experts = max(trace.num_experts for trace in traces)
    trace = concatenate([dataclasses.replace(trace, num_experts=experts) for trace in traces])
    settings = SimulationSettings(
        planner=args.planner,
        solver=args.solver,
        deadline_s=args.deadline,
        interval_s=_positive("interval", args.interval),
        window_s=_positive("window", args.window),
        tokens_per_s=_positive("rate", args.rate),
        move_share=DEFAULT_MOVE_SHARE if args.move_share is None else None if args.move_share == 1 else args.move_share,
        semantics=Semantics(args.semantics),
        links=Links(worker_gbps=args.worker_gbps, node_gbps=args.node_gbps),
        expert_bytes=args.expert_bytes,
        horizon_steps=args.horizon,
        seed=args.seed,
    )

    def progress(look: Look) -> None:
        if not args.json:
            mark = "change" if look.changed else "stay"
            load = f"load {look.imbalance:.3f} (static {look.imbalance_static:.3f})"
            print(f"{look.time_s:8.0f} s  {load}  {mark}: {look.reason}", flush=True)

    looks = simulate(trace, _workers(args, old, experts), settings, first=old, progress=progress)
    if args.out is not None:
        _make_folder(args.out)
        _write(args.out / "looks.json", json.dumps([dataclasses.asdict(look) for look in looks], indent=1))
        from optimizer import figures

        _drawn(lambda: figures.imbalance_over_time(args.out / "imbalance.png", looks))
    summary = _summary(looks)
    print(json.dumps(summary) if args.json else _simulation_text(summary))
    return 0


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ConfigError(f"--{name}: expected a positive number, got {value}")
    return value


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


def _simulation_text(summary: dict[str, Any]) -> str:
    return (
        f"{summary['intervals']} intervals, {summary['changes']} changes, {summary['moves']} moves "
        f"({summary['bytes'] / 1e9:.1f} GB); load {summary['load_imbalance']:.3f} max/mean against "
        f"{summary['load_imbalance_static']:.3f} without, fan-out {summary['fan_out']:.2f} against "
        f"{summary['fan_out_static']:.2f}"
    )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
