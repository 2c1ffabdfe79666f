"""Predicted against measured: decode steps of workers that have memory for a part of their experts.

    python -m tests.bench.predicted --model DIR --workers 2 --device-experts 16

The steps are those of tests/bench/workers.py. What the cost model predicts is made of what was routed, of the disk's
rate as each worker measured it when it loaded, and of the step of workers that have all in memory: of that step the
experts' part, by its share of the bytes of weights, goes on while experts are read. Prints both, with a mark where
they differ by more than 20 %.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from elastic_moe.actors.coordinator.planning import build_problem
from elastic_moe.cluster.facts.sampling import RoutingSample
from elastic_moe.cluster.facts.tiering import cache_slots_of
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.placement import Placement
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.optimizer.core.cost import expected_fetches, shares
from elastic_moe.optimizer.core.problem import PlacementProblem
from elastic_moe.optimizer.core.tiering import placed_by
from elastic_moe.optimizer.residency.activity import activity
from elastic_moe.optimizer.residency.memory import WorkerMemory
from tests.bench.machine import where_and_when
from tests.bench.workers import Case, Setup, Times, Workers, placed

WRONG = 0.2
"""Predictions that are further off are marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A decode step, of the slowest worker."""

    step_s: float
    missed: float
    """Share of the active experts that were not in memory."""
    read_bytes: float
    """Of all workers."""


def problem_of(
    info: ModelInfo, placement: Placement, measured: Sequence[Times], rates: Sequence[float], device: int, batch: int
) -> PlacementProblem:
    """The problem that the coordinator would make of these counts. device: experts per layer."""
    routing = [times.routing for times in measured if times.routing is not None]
    memory = tuple(
        WorkerMemory(
            device_experts=device * info.num_layers,
            disk_fetch_s=len(rates) * info.expert_bytes / rate,
            cache_slots=cache_slots_of(device),
        )
        for rate in rates
    )
    load = np.sum([counts.load for counts in routing], axis=0).astype(np.float64)
    sample = RoutingSample(
        num_layers=info.num_layers,
        num_experts=info.num_logical_experts,
        parts=tuple((counts.sample, counts.tokens) for counts in routing if len(counts.sample)),
    )
    transitions = sample.transitions()
    return build_problem(
        info, placement, load, transitions, dtype=info.dtype, memory=memory, tokens_per_step=batch, shared_disk=True
    )


def predicted(problem: PlacementProblem, placement: Placement, info: ModelInfo, resident_s: float) -> Step:
    """What the cost model says of a step that takes `resident_s` where all is in memory."""
    tiering = problem.tiering
    assert tiering is not None
    x = shares(problem, placement.physical_to_logical_map)
    active = activity(tiering.chance[:, :, None] * x, tiering.tokens).sum(axis=1).max(axis=1)
    expert_bytes = active * info.expert_bytes
    part = expert_bytes / (expert_bytes.sum() + info.trunk_bytes)
    experts_s = resident_s * part
    waits_s = tiering.waits(x, tiering.levels(x, placed_by(problem, placement)))
    fetches = expected_fetches(problem, placement)
    return Step(
        step_s=resident_s + float(np.maximum(waits_s - experts_s, 0.0).sum()),
        missed=fetches.misses,
        read_bytes=fetches.experts * info.expert_bytes,
    )


def measured_step(turns: Sequence[Sequence[Times]]) -> Step:
    """Medians over turns [turns][workers]."""
    slowest = [max(turn, key=lambda times: times.step_s) for turn in turns]
    missed = [statistics.mean(times.missed for times in turn) for turn in turns]
    return Step(
        step_s=statistics.median(times.step_s for times in slowest),
        missed=statistics.median(missed),
        read_bytes=statistics.median(sum(times.read_bytes for times in turn) for turn in turns),
    )


def line(batch: int, device: int, said: Step, seen: Step, resident_s: float) -> str:
    ratio = said.step_s / seen.step_s
    mark = " <- off by more than 20 %" if abs(ratio - 1) > WRONG else ""
    return (
        f"| {batch} | {device} | {1e3 * resident_s:.2f} | {1e3 * said.step_s:.2f} | {1e3 * seen.step_s:.2f} |"
        f" {ratio:.2f}{mark} | {said.missed:.0%} | {seen.missed:.0%} | {said.read_bytes / 1e6:.1f} |"
        f" {seen.read_bytes / 1e6:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of the checkpoint")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--device-experts", type=int, nargs="+", default=[16], help="experts per layer and worker")
    parser.add_argument("--context", type=int, default=128, help="tokens before the first decode step")
    parser.add_argument("--steps", type=int, default=20, help="decode steps of one turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cache-dir", help="directory of the records; the default is the server's")
    args = parser.parse_args()
    info = open_checkpoint(args.model).info
    everything = Setup(
        workers=args.workers, threads=max(1, len(os.sched_getaffinity(0)) // args.workers), pinned=False,
        cache_dir=args.cache_dir,
    )  # fmt: skip
    setups = [everything, *(replace(everything, device_experts=device) for device in args.device_experts)]
    cases = [
        Case(requests=n, context=args.context, steps=args.steps, most_requests=max(args.batches)) for n in args.batches
    ]
    running = [Workers(args.model, setup, cases) for setup in setups]
    print(", ".join(f"{key} {value}" for key, value in where_and_when().items()))
    print("rates of the disk in MB/s:", [[round(rate / 1e6) for rate in each.disk_bytes_per_s] for each in running[1:]])
    print("| batch | experts in memory | all in memory ms | predicted ms | measured ms | predicted / measured |"
          " misses predicted | measured | MB read predicted | measured |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    # sets take turns, since the machine's speed changes
    turns: dict[tuple[int, int], list[list[Times]]] = {}
    for _ in range(args.turns):
        for number in range(len(cases)):
            for n, workers in enumerate(running):
                turns.setdefault((number, n), []).append(workers.run_all(number))
    for number, case in enumerate(cases):
        resident_s = measured_step(turns[number, 0]).step_s
        for n, setup in enumerate(setups[1:], start=1):
            placement = placed(info, setup)
            seen = [times for turn in turns[number, n] for times in turn]
            problem = problem_of(
                info, placement, seen, running[n].disk_bytes_per_s, setup.device_experts, case.requests
            )
            said = predicted(problem, placement, info, resident_s)
            print(line(case.requests, setup.device_experts, said, measured_step(turns[number, n]), resident_s))
    for workers in running:
        workers.close()


if __name__ == "__main__":
    main()
