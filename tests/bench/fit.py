"""Which path each tested family takes on this machine, and what joining the layers of one model gives.

    python -m tests.bench.fit [--dtype bfloat16] [--reasons]
    python -m tests.bench.fit --pairs DIR [--threads 1] [--turns 40]

The first prints the matrix of paths over tiny random checkpoints of all families of the tests, and with --reasons why
no faster path serves a part. The second runs decode steps of the checkpoint in DIR by two workers in turns, one of
which does not join the layers to one call, and prints medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from elastic_moe.cluster.fit import FitReport, Part
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, load_trunk
from elastic_moe.model.fitting import fit as fitting
from elastic_moe.model.worker.data_plane import DataPlane
from tests.bench.report import markdown
from tests.bench.step import CONTEXT, load_worker, step_s
from tests.bench.workers import BLOCK, Case, Load
from tests.model.families import FAMILIES, HYBRIDS, tiny_checkpoint

BATCHES = (1, 8)


def report_of(path: Path, dtype: torch.dtype) -> FitReport:
    """The report for a checkpoint's trunk, and for experts without weights."""
    trunk = load_trunk(open_checkpoint(str(path)), dtype=dtype, device=torch.device("cpu"))
    return fitting.fit(trunk, expert_modules(trunk), block_size=BLOCK).report()


def matrix(reports: Mapping[str, FitReport]) -> str:
    """The path of each part by family. Families with the same paths share a row."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for family, report in reports.items():
        alike.setdefault(tuple(report.shares(part) for part in Part), []).append(family)
    head = ("families", *(part.replace("_", " ") for part in Part))
    return markdown(head, [[", ".join(families), *cells] for cells, families in alike.items()])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Medians of a decode step, in seconds."""

    wall_s: float
    cpu_s: float
    """Of this process: other processes on the machine disturb it less."""


def decode_pairs(path: Path, threads: int, turns: int, batch: int) -> tuple[StepTime, StepTime]:
    """(joined, layer by layer), of workers that take turns step by step."""
    joined = load_worker(path, threads)
    with mock.patch.object(fitting, "join_layers", return_value="the benchmark does not want it"):
        single = load_worker(path, threads)
    times: list[list[tuple[float, float]]] = [[], []]
    loads = []
    for worker in (joined, single):
        case = Case(requests=batch, context=CONTEXT, steps=turns, most_requests=batch)
        loads.append(Load(case, 0, 0, 1, open_checkpoint(path).info.vocab_size, worker.window_room))
        worker.step(loads[-1].prefill())
    for turn in range(turns):
        order: Sequence[tuple[int, DataPlane]] = [(0, joined), (1, single)]
        for n, worker in order[:: -1 if turn % 2 else 1]:
            begin_s = time.process_time()
            wall_s = step_s(worker, loads[n].decode())
            times[n].append((wall_s, time.process_time() - begin_s))
    fast, slow = (_medians(column[2:]) for column in times)
    return fast, slow


def _medians(times: Sequence[tuple[float, float]]) -> StepTime:
    wall_s, cpu_s = (statistics.median(column) for column in zip(*times, strict=True))
    return StepTime(wall_s=wall_s, cpu_s=cpu_s)


def pairs_table(path: Path, threads: int, turns: int) -> str:
    """The share of a decode step's time that joining saves."""
    head = ("decode of", "joined ms", "layer by layer ms", "shorter by %", "CPU ms", "layer by layer", "less by %")
    rows = []
    for batch in BATCHES:
        fast, slow = decode_pairs(path, threads, turns, batch)
        cells = [
            f"{value:.2f}"
            for a, b in ((fast.wall_s, slow.wall_s), (fast.cpu_s, slow.cpu_s))
            for value in (a * 1e3, b * 1e3, 100 * (1 - a / b))
        ]
        rows.append([str(batch), *cells])
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--reasons", action="store_true", help="print why no faster path serves a part")
    parser.add_argument("--pairs", type=Path, metavar="DIR", help="measure a checkpoint with and without joined layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=40, help="decode steps of each worker; at most 300")
    args = parser.parse_args()
    if args.pairs is not None:
        torch.set_num_threads(args.threads)
        print(pairs_table(args.pairs, args.threads, args.turns))
        return
    with tempfile.TemporaryDirectory() as made:
        checkpoints = {family: tiny_checkpoint(family, Path(made)) for family in [*FAMILIES, *HYBRIDS]}
        reports = {family: report_of(path, getattr(torch, args.dtype)) for family, path in checkpoints.items()}
    print(matrix(reports))
    if args.reasons:
        for family, report in reports.items():
            print("\n  ".join((family, *report.reasons())))


if __name__ == "__main__":
    main()
