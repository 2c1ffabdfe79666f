"""What it would gain to fetch each miss on the worker that has least to fetch in the step: a replay, nothing measured.

    python -m tests.bench.balanced TRACE.npz... --device-experts 4 8 --step-tokens 8

A placement says beforehand which worker fetches an expert. The slowest worker of a step then fetches more than the
mean. Prints, for pinning by frequency and for a plan, the fetches that the layers of a step wait for, and how many they
would be if the same misses were dealt evenly in each step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from elastic_moe.cluster.facts.tiering import cache_slots_of
from elastic_moe.cluster.placement import Placement
from elastic_moe.optimizer.buffering.policies import DEFAULT_POLICY, make_policy
from elastic_moe.optimizer.buffering.simulate import replay
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.residency.memory import WorkerMemory
from elastic_moe.optimizer.study.caches import MOST_STEPS, WARM_UP
from elastic_moe.optimizer.study.scenario import make_workers, problem_from_trace
from elastic_moe.optimizer.study.steps import active_experts, decoding_steps
from elastic_moe.optimizer.study.traces import Trace, load_trace

PLANNERS = ("pinning", "auto")
FETCH_S = 5.8e-3
"""Of one expert of DeepSeek-V2-Lite at 24 Gb/s."""


def waits(test: Trace, placement: Placement, device: int, batch: int) -> tuple[float, float]:
    """(fetches waited for, the same if each step's misses were dealt evenly), summed over layers; means of steps."""
    steps = decoding_steps(test, min(batch, len(test.request_lengths)), MOST_STEPS)
    skip = int(WARM_UP * len(steps))
    slowest, even = 0.0, 0.0
    for layer in range(test.num_layers):
        active = active_experts(test, steps, layer)
        misses = []
        for worker in placement.workers:
            mine, pins = set(placement.experts_of(worker.id, layer)), placement.resident(worker.id, layer)
            served = [[expert for expert in step if expert in mine] for step in active]
            policy, area = make_policy(DEFAULT_POLICY, test.num_experts), max(1, device - len(pins))
            misses.append(replay(served, policy, area, pinned=pins, skip=skip).misses_by_step)
        counts = np.array(misses)
        slowest += float(counts.max(axis=0).mean())
        even += float(np.ceil(counts.sum(axis=0) / len(counts)).mean())
    return slowest, even


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device-experts", type=int, nargs="+", default=[4, 8], help="experts per layer and worker")
    parser.add_argument("--step-tokens", type=int, default=8)
    args = parser.parse_args()
    print("| trace, experts in memory | planner | waits | dealt evenly | less |\n|---|---|---|---|---|")
    for path in args.traces:
        profile, test = load_trace(path, None).halves()
        workers = make_workers(args.workers, nodes=1, num_experts=profile.num_experts, redundant=0)
        for device in args.device_experts:
            memory = WorkerMemory(
                device_experts=device * profile.num_layers, disk_fetch_s=FETCH_S, cache_slots=cache_slots_of(device)
            )
            problem = problem_from_trace(
                profile, workers, memory=(memory,) * args.workers, tokens_per_step=args.step_tokens
            )
            for planner in PLANNERS:
                placement = plan(problem, planner=planner, deadline_s=10.0).placement
                slowest, even = waits(test, placement, device, args.step_tokens)
                share = 1 - even / slowest
                print(f"| {path.stem}, {device} | {planner} | {slowest:.1f} | {even:.1f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
