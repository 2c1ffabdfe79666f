"""The flags of the verbs about placements: `emoe plan`, `evaluate`, `compare` and `simulate`.

The verbs themselves are in plan_verbs.py and compare.py, which are imported when one runs. They need neither a cluster
nor a model, but a routing trace and a description of the workers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from elastic_moe.cluster.setting import DAY_S, MILLION, MOST_BYTES, number_flag, path_flag, size_flag
from elastic_moe.deploy.launch.builtin import MODEL, MODEL_DIR, trace_path
from elastic_moe.deploy.tiers.flags import tier_arguments
from elastic_moe.optimizer.core.problem import Links, PlacementProblem, Semantics
from elastic_moe.optimizer.core.solvers import SOLVERS
from elastic_moe.optimizer.decision import MOVE_SHARE
from elastic_moe.optimizer.planner import PLANNERS
from elastic_moe.optimizer.study.scenario import MOST_WORKERS
from elastic_moe.optimizer.study.simulate import SimulationSettings
from elastic_moe.optimizer.study.traces import MOST_EXPERTS

PLAN_VERBS, COMPARE = "elastic_moe.deploy.cli.plan_verbs", "elastic_moe.deploy.cli.compare"

DEFAULT_WORKERS = 8
_gbps = number_flag(float, 0.001, MILLION)
_cores = number_flag(float, 1, MOST_WORKERS)
_EXPERT_BYTES = 17_301_504


def add_parsers(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verbs; each parser's `run` takes the parsed arguments and returns the exit code."""
    for name, add, module, what in (
        ("plan", _plan_arguments, PLAN_VERBS, "plan where the experts of a traced model should sit"),
        ("evaluate", _evaluate_arguments, PLAN_VERBS, "measure a placement on a trace"),
        ("compare", _compare_arguments, COMPARE, "run many planners on a trace: table and figures"),
        ("simulate", _simulate_arguments, COMPARE, "replay traces through the re-placement decisions"),
    ):
        parser = subparsers.add_parser(name, help=what, description=what.capitalize() + ".", allow_abbrev=False)
        add(parser)
        parser.set_defaults(run=_later(module, f"run_{name}"))


def _later(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        if args.expert_bytes is None:
            args.expert_bytes = _expert_bytes(args.traces if "traces" in args else [args.trace])
        return int(getattr(import_module(module), function)(args))

    return run


def _expert_bytes(traces: Sequence[Path]) -> int:
    """The size of an expert of the traced model, as far as it is known."""
    builtin = all(trace.is_relative_to(MODEL_DIR) for trace in traces)
    return MODEL.expert_bytes if builtin else _EXPERT_BYTES


def _cluster_arguments(parser: argparse.ArgumentParser) -> None:
    links, problem = Links(), PlacementProblem.__dataclass_fields__
    parser.add_argument(
        "--workers", type=number_flag(int, 1, MOST_WORKERS), metavar="N",
        help=f"number of workers, at most one for each expert of a layer and replica ({DEFAULT_WORKERS}, or those of "
        "--from)",
    )  # fmt: skip
    parser.add_argument(
        "--nodes", type=number_flag(int, 1, MOST_WORKERS), default=1, metavar="N",
        help="number of nodes that the workers are spread over (1)",
    )  # fmt: skip
    parser.add_argument(
        "--redundant", type=number_flag(int, 0, MILLION), default=0, metavar="N",
        help="number of replicas per layer, over all workers (0)",
    )  # fmt: skip
    parser.add_argument("--speeds", metavar="S,S,..", help="relative speed of each worker (all the same)")
    parser.add_argument(
        "--node-cores",
        type=_cores,
        default=problem["node_cores"].default,
        metavar="N",
        help="workers of a node that compute at full speed at once; more of them share its cores, or its GPU (all)",
    )
    parser.add_argument(
        "--experts", type=number_flag(int, 1, MOST_EXPERTS), metavar="E",
        help="number of experts per layer (highest id in the trace + 1)",
    )  # fmt: skip
    parser.add_argument(
        "--semantics",
        choices=[str(s) for s in Semantics],
        default="home",
        help="where a token is between two MoE layers: home, or where its expert was (home)",
    )
    parser.add_argument(
        "--worker-gbps", type=_gbps, default=links.worker_gbps, metavar="GBPS",
        help=f"bandwidth of a worker's port in Gb/s ({links.worker_gbps:g})",
    )  # fmt: skip
    parser.add_argument(
        "--node-gbps", type=_gbps, default=links.node_gbps, metavar="GBPS",
        help=f"bandwidth of a node's uplink in Gb/s ({links.node_gbps:g})",
    )  # fmt: skip
    parser.add_argument(
        "--expert-bytes",
        type=size_flag(0, MOST_BYTES),
        metavar="BYTES",
        help=f"size of one expert, such as 16.5MiB ({MODEL.expert_bytes} for traces of the built-in model, else "
        f"{_EXPERT_BYTES}, as in DeepSeek-V2-Lite)",
    )
    parser.add_argument(
        "--horizon",
        type=number_flag(float, 0.001, 1e15),
        default=problem["horizon_steps"].default,
        metavar="STEPS",
        help="number of steps over which the cost of moves is spread (10000)",
    )
    tier_arguments(parser)


def _solving_arguments(parser: argparse.ArgumentParser, deadline_s: float) -> None:
    parser.add_argument(
        "--deadline",
        type=number_flag(float, 0.001, DAY_S),
        default=deadline_s,
        metavar="SECONDS",
        help=f"seconds that planning may take ({deadline_s:g})",
    )
    parser.add_argument("--solver", choices=SOLVERS, default="highs", help="solver for integer programs (highs)")
    parser.add_argument(
        "--seed", type=number_flag(int, 0, 2**32 - 1), default=0, metavar="N", help="seed of all random numbers (0)"
    )


def _from_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="old", type=path_flag, metavar="OLD.json", help="file with the placement in force"
    )
    parser.add_argument(
        "--move-share",
        type=number_flag(float, 0, 1),
        metavar="SHARE",
        help=f"with --from, the largest share of all experts that may move ({MOVE_SHARE}; 1 sets no limit)",
    )


def _weights_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", metavar="W,W,..", help="how much each trace that the planner sees counts (all the same)"
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "traces",
        type=trace_path,
        nargs="+",
        metavar="TRACE.npz",
        help="traces of the subjects that the placement must serve",
    )
    _weights_argument(parser)
    _cluster_arguments(parser)
    parser.add_argument(
        "--planner", choices=PLANNERS, default="auto", metavar="NAME", help=f"one of {', '.join(PLANNERS)} (auto)"
    )
    _solving_arguments(parser, 10.0)
    _from_arguments(parser)
    parser.add_argument("--out", type=path_flag, metavar="NEW.json", help="file for the placement (none)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _placement_file(text: str) -> Path:
    if text.startswith("builtin:") or text.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"expected a placement, got the trace {text}, which comes first")
    return path_flag(text)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=trace_path, metavar="TRACE.npz", help="trace to measure on")
    parser.add_argument("placement", type=_placement_file, metavar="PLACEMENT.json", help="file with the placement")
    _cluster_arguments(parser)
    parser.add_argument(
        "--from", dest="old", type=path_flag, metavar="OLD.json", help="count moves and bytes from this placement"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=trace_path, metavar="TRACE.npz", help="trace that the planners see")
    parser.add_argument(
        "tests",
        type=trace_path,
        nargs="*",
        metavar="TEST.npz",
        help="traces to measure on; without any, the planners see the first half and the second half is measured",
    )
    parser.add_argument(
        "--scenarios",
        type=trace_path,
        nargs="+",
        default=[],
        metavar="TRACE.npz",
        help="further traces that the planners see, each a subject that the placement must serve",
    )
    _weights_argument(parser)
    _cluster_arguments(parser)
    parser.add_argument(
        "--planners", default="all", metavar="A,B,..", help="names of planners as in emoe plan --help, or all (all)"
    )
    _solving_arguments(parser, 10.0)
    _from_arguments(parser)
    parser.add_argument(
        "--out", type=path_flag, required=True, metavar="DIR", help="folder for the table and the figures"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per planner")


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    settings = SimulationSettings()
    parser.add_argument(
        "traces", type=trace_path, nargs="+", metavar="TRACE.npz", help="traces that are served one after another"
    )
    _cluster_arguments(parser)
    parser.add_argument(
        "--planner", choices=PLANNERS, default="auto", metavar="NAME", help=f"one of {', '.join(PLANNERS)} (auto)"
    )
    _solving_arguments(parser, settings.deadline_s)
    _from_arguments(parser)
    parser.add_argument(
        "--interval",
        type=number_flag(float, 0.001, 1e9),
        default=settings.interval_s,
        metavar="SECONDS",
        help=f"virtual seconds between two checks of the placement ({settings.interval_s:g})",
    )
    parser.add_argument(
        "--window",
        type=number_flag(float, 0.001, 1e9),
        default=settings.window_s,
        metavar="SECONDS",
        help=f"virtual seconds for which statistics are kept ({settings.window_s:g})",
    )
    parser.add_argument(
        "--rate", type=number_flag(float, 0.001, 1e9), default=settings.tokens_per_s, metavar="TOK/S",
        help=f"tokens per virtual second ({settings.tokens_per_s:g})",
    )  # fmt: skip
    parser.add_argument(
        "--cache",
        action="store_true",
        help="replay the traces through caches of experts instead: miss rates and step times by policy and size",
    )
    parser.add_argument("--out", type=path_flag, metavar="DIR", help="folder for the figures and the table (none)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
