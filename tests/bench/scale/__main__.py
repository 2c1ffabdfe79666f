"""python -m tests.bench.scale [--quick] [--out DIR]: see the package.

Imports are made late, because every simulated process imports this module.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ENGINE = (
    *((1, 64), (1, 256), (8, 512), (8, 2048)),
    *((64, 512), (64, 2048), (64, 4096), (64, 8192), (64, 16384)),
    *((256, 16384), (256, 65536)),
)
CONTROL = (2, 8, 32, 64, 128, 256)
API = (1, 2, 4)
QUICK_ENGINE = ((1, 64), (8, 512), (64, 4096))
QUICK_CONTROL = (2, 8)
PASSED_ON = ("seconds", "processes", "step-ms", "token-us", "streams", "token-ms")


def in_process(options: argparse.Namespace, kind: str, *sizes: int) -> dict[str, Any]:
    """Each measurement has a process of its own, so that none has the memory of another."""
    same = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in PASSED_ON]
    command = [sys.executable, "-m", "tests.bench.scale", *same, "--only", kind, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


def one(arguments: list[str], options: argparse.Namespace) -> None:
    kind, *numbers = arguments
    cost: Any
    if kind == "engine":
        from tests.bench.scale import engine

        workers, sequences = map(int, numbers)
        cost = engine.measure(
            workers,
            sequences,
            processes=options.processes,
            seconds=options.seconds,
            step_s=1e-3 * options.step_ms,
            token_s=1e-6 * options.token_us,
        )
    elif kind == "api":
        from tests.bench.scale import api

        interval_s = 1e-3 * options.token_ms
        cost = api.measure(int(numbers[0]), options.streams, seconds=options.seconds, interval_s=interval_s)
    else:
        from tests.bench.scale import control

        cost = control.measure(int(numbers[0]))
    print(json.dumps(asdict(cost)))


def main() -> None:
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small sizes")
    parser.add_argument("--engine", nargs="*", help="sizes for the engine, such as 64x4096 (workers x sequences)")
    parser.add_argument("--control", nargs="*", type=int, help="numbers of workers for the coordinator")
    parser.add_argument("--api", nargs="*", type=int, help="numbers of API replicas")
    parser.add_argument("--out", type=Path, help="a directory for scale.json and scale.svg")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds for which each size is measured")
    parser.add_argument("--processes", type=int, default=2, help="processes of simulated workers")
    parser.add_argument("--step-ms", type=float, default=20.0, help="a device's time for a step of up to 256 tokens")
    parser.add_argument("--token-us", type=float, default=20.0, help="a device's time for each further token")
    parser.add_argument("--streams", type=int, default=64, help="streams of each API replica")
    parser.add_argument("--token-ms", type=float, default=20.0, help="time in which each stream gets a token")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        one(options.only, options)
        return
    from tests.bench.machine import where_and_when
    from tests.bench.scale import report
    from tests.bench.scale.api import ApiCost
    from tests.bench.scale.control import ControlCost
    from tests.bench.scale.engine import EngineCost

    print("\n".join(f"{name}: {value}" for name, value in where_and_when().items()), flush=True)
    costs = []
    sizes: Sequence[tuple[int, ...]] = QUICK_ENGINE if options.quick else ENGINE
    if options.engine is not None:
        sizes = [tuple(map(int, size.split("x"))) for size in options.engine]
    for workers, sequences in sizes:
        costs.append(EngineCost(**in_process(options, "engine", workers, sequences)))
        print(costs[-1], flush=True)
    changes = []
    clusters = QUICK_CONTROL if options.quick else CONTROL
    for workers in clusters if options.control is None else options.control:
        changes.append(ControlCost(**in_process(options, "control", workers)))
        print(changes[-1], flush=True)
    replicas = []
    for number in API if options.api is None else options.api:
        replicas.append(ApiCost(**in_process(options, "api", number)))
        print(replicas[-1], flush=True)
    tables = ((report.ENGINE, costs), (report.CONTROL, changes), (report.API, replicas))
    print(*(report.table(columns, rows) for columns, rows in tables), sep="\n\n")
    print("\n" + report.exponents(costs, changes))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        found = (("engine", costs), ("control", changes), ("api", replicas))
        values = {name: report.as_values(rows) for name, rows in found}
        (options.out / "scale.json").write_text(json.dumps(values, indent=1))
        report.plot(options.out / "scale.svg", costs, changes)


if __name__ == "__main__":
    main()
