"""What the verbs about placements share: they make traces, workers and problems of flags, and write files."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.placement import Placement, Worker
from elastic_moe.deploy.cli.plan import DEFAULT_WORKERS
from elastic_moe.deploy.tiers.flags import memories, step_tokens, with_kv_price
from elastic_moe.optimizer.core.cost import expected_fetches, moves_to, price
from elastic_moe.optimizer.core.problem import DEFAULT_STEP_TOKENS, Links, PlacementProblem, Semantics
from elastic_moe.optimizer.decision import MOVE_SHARE
from elastic_moe.optimizer.study.caches import replay_problem
from elastic_moe.optimizer.study.metrics import measure
from elastic_moe.optimizer.study.scenario import make_workers, problem_from_trace
from elastic_moe.optimizer.study.traces import Trace, load_trace


def choose_workers(args: argparse.Namespace, old: Placement | None, num_experts: int) -> tuple[Worker, ...]:
    """The workers of --from, unless --workers asks for others. Raises ConfigError for more than there are experts."""
    if args.workers is None and old is not None:
        return old.workers
    number = DEFAULT_WORKERS if args.workers is None else args.workers
    if number > num_experts + args.redundant:
        most = f"{num_experts}, the experts of a layer" + (", and --redundant" if args.redundant else "")
        raise ConfigError(f"--workers: expected at most {most}, since every worker holds one at least; got {number}")
    return make_workers(number, nodes=args.nodes, num_experts=num_experts, redundant=args.redundant)


def _speeds(args: argparse.Namespace) -> tuple[float, ...]:
    if args.speeds is None:
        return ()
    try:
        return tuple(float(speed) for speed in args.speeds.split(","))
    except ValueError:
        raise ConfigError(f"--speeds: expected numbers with commas between, got {args.speeds!r}") from None


def load_old(args: argparse.Namespace) -> Placement | None:
    return None if args.old is None else Placement.load(args.old)


def read_trace(args: argparse.Namespace, path: Path, *others: Placement | None) -> Trace:
    """Read a trace. A given placement determines the number of experts, since not every id need occur in the trace."""
    known = next((placement.num_logical_experts for placement in others if placement is not None), None)
    return load_trace(path, known if args.experts is None else args.experts)


def same_experts(traces: Sequence[Trace]) -> list[Trace]:
    """The traces with as many experts as the one with most, since not every id need occur in each."""
    experts = max(trace.num_experts for trace in traces)
    return [dataclasses.replace(trace, num_experts=experts) for trace in traces]


def weights_of(args: argparse.Namespace) -> tuple[float, ...]:
    """The weights of the traces that the planner sees, the first trace's first; none where all count the same."""
    if args.weights is None:
        return ()
    try:
        return tuple(float(weight) for weight in args.weights.split(","))
    except ValueError:
        raise ConfigError(f"--weights: expected numbers with commas between, got {args.weights!r}") from None


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each trace: its file's name without the ending, and a number where two have the same."""
    stems = [path.stem for path in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}-{n + 1}" for n, stem in enumerate(stems)]


def make_problem(
    args: argparse.Namespace,
    trace: Trace,
    workers: tuple[Worker, ...],
    old: Placement | None,
    *,
    others: Sequence[Trace] = (),
    weights: Sequence[float] = (),
) -> PlacementProblem:
    """The problem of serving the trace, and further subjects where `others` are given."""
    problem = problem_from_trace(
        trace,
        workers,
        others=others,
        weights=weights,
        semantics=Semantics(args.semantics),
        current=old,
        links=Links(worker_gbps=args.worker_gbps, node_gbps=args.node_gbps),
        expert_bytes=args.expert_bytes,
        horizon_steps=args.horizon,
        speeds=_speeds(args),
        node_cores=args.node_cores,
        memory=memories(args, len(workers), trace.num_layers),
        tokens_per_step=step_tokens(args, DEFAULT_STEP_TOKENS),
        dealt=args.dealt,
    )
    return with_kv_price(args, problem)


def move_budget(args: argparse.Namespace, problem: PlacementProblem) -> int | None:
    if args.old is None and args.move_share is not None:
        raise ConfigError("--move-share: it limits moves from a placement, so --from is needed")
    share = move_share(args)
    if problem.current is None or problem.current.workers != problem.workers or share is None:
        return None
    return math.floor(share * problem.num_layers * problem.num_experts)


def move_share(args: argparse.Namespace) -> float | None:
    """The largest share of all experts that may move; None sets no limit."""
    share = MOVE_SHARE if args.move_share is None else args.move_share
    return None if share == 1 else float(share)


def describe(trace: Trace, problem: PlacementProblem, placement: Placement) -> dict[str, Any]:
    """The figures that every verb prints under the same names."""
    moves = moves_to(problem, placement)
    cost = price(problem, placement)
    return {
        **dataclasses.asdict(measure(trace, placement, problem.semantics)),
        "step_cost": cost.step_s,
        "cost": dataclasses.asdict(cost),
        "moves": moves,
        "bytes": moves * problem.expert_bytes,
        **_tiers(trace, problem, placement),
    }


def _tiers(trace: Trace, problem: PlacementProblem, placement: Placement) -> dict[str, Any]:
    """What does not fit, expected and replayed; nothing where all experts do."""
    if problem.tiering is None:
        return {}
    misses = expected_fetches(problem, placement)
    replayed = replay_problem(trace, problem, placement)
    return {
        "resident_share": misses.resident_share,
        "fetches": misses.experts,
        "fetch_bytes": misses.experts * problem.expert_bytes,
        "miss_rate": misses.misses,
        "replayed_miss_rate": replayed.miss_rate,
        "replayed_waits": replayed.fetches,
    }


def write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
