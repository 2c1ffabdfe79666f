"""The flags of `emoe calibrate`. The verb is imported when it runs."""

from __future__ import annotations

import argparse
from typing import Any

from elastic_moe.cluster.setting import MILLION, number_flag, path_flag
from elastic_moe.deploy.launch.builtin import MODEL_DIR
from elastic_moe.optimizer.core.problem import DEFAULT_STEP_TOKENS

STEPS, TURNS = 3, 6
"""How often each placement is measured, unless something else is asked for."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb; the parser's `run` takes the parsed arguments and returns the exit code."""
    what = "fit the planners' cost model to steps that are measured on this machine"
    parser = subparsers.add_parser(
        "calibrate",
        help=what,
        description=what.capitalize() + ", or on the nodes of a Ray cluster, with CPU workers and without a server."
        " `emoe serve` of the same model then plans with the constants.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", nargs="?", type=path_flag, default=MODEL_DIR, metavar="MODEL_DIR",
        help="directory of the model (the built-in model)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=number_flag(int, 2, 64), nargs="+", default=[2], metavar="N",
        help="numbers of workers to measure with (2)",
    )  # fmt: skip
    parser.add_argument(
        "--address", metavar="HOST:PORT",
        help="Ray cluster over whose nodes with CPUs the workers are spread evenly; MODEL_DIR must be on each. Run it "
        "on the head, where `emoe serve --address` looks for the constants (this machine alone)",
    )  # fmt: skip
    parser.add_argument(
        "--step-tokens", type=number_flag(int, 1, MILLION), default=DEFAULT_STEP_TOKENS, metavar="N",
        help=f"prompt tokens of a step, of all workers ({DEFAULT_STEP_TOKENS})",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=number_flag(int, 1, 10_000), default=STEPS, metavar="N",
        help=f"steps under a placement in a turn ({STEPS})",
    )  # fmt: skip
    parser.add_argument(
        "--turns", type=number_flag(int, 1, 10_000), default=TURNS, metavar="N",
        help=f"turns over all placements ({TURNS})",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="as for `emoe serve` (auto)"
    )
    parser.add_argument(
        "--expert-dtype",
        default="auto",
        choices=("auto", "bfloat16", "int8", "int4"),
        help="as for `emoe serve` (auto)",
    )
    parser.add_argument(
        "--trunk-dtype", default="auto", choices=("auto", "bfloat16", "int8"), help="as for `emoe serve` (auto)"
    )
    parser.add_argument(
        "--out", type=path_flag, metavar="FILE.json",
        help="file for the constants, for `emoe serve --calibration` (the one that `emoe serve` of this model reads)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object for each number of workers")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from elastic_moe.deploy.calibrating.calibrate import run_calibrate

    return run_calibrate(args)
