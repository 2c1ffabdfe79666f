"""What it gains to fetch each miss on the worker that has least to fetch in the step: a replay, nothing measured.

    python -m tests.bench.balanced TRACE.npz... --device-experts 4 8 --step-tokens 8

A placement says beforehand which worker fetches an expert. The slowest worker of a step then fetches more than the
mean. Prints, for pinning by frequency and for a plan, the fetches that the layers of a step wait for: where each worker
fetches what the placement gives it, and where the misses of each step are dealt among the workers, as they are between
nodes (optimizer/buffering/dealing.py). tests/bench/dealt.py measures it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path

from elastic_moe.cluster.facts.tiering import cache_slots_of
from elastic_moe.cluster.placement import Placement
from elastic_moe.optimizer.buffering.dealing import deal
from elastic_moe.optimizer.buffering.policies import DEFAULT_POLICY, make_policy
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.residency.memory import WorkerMemory
from elastic_moe.optimizer.study.caches import MOST_STEPS, WARM_UP
from elastic_moe.optimizer.study.scenario import make_workers, problem_from_trace
from elastic_moe.optimizer.study.steps import active_experts, decoding_steps
from elastic_moe.optimizer.study.traces import Trace, load_trace

PLANNERS = ("pinning", "auto")
FETCH_S = 5.8e-3
"""Of one expert of DeepSeek-V2-Lite at 24 Gb/s."""


class Worker:
    """One worker's cache of one layer."""

    def __init__(self, pinned: Collection[int], area: int, num_experts: int) -> None:
        self._policy, self._area = make_policy(DEFAULT_POLICY, num_experts), area
        self.pinned = frozenset(pinned)
        self.cached: dict[int, None] = {}

    def step(self, active: Sequence[int], missing: Sequence[int]) -> None:
        """Serve a step: the `active` experts, of which the `missing` ones are fetched."""
        self._policy.note(active)
        for expert in missing:
            if len(self.cached) == self._area:
                del self.cached[self._policy.victim(list(self.cached), ())]
            self.cached[expert] = None


def misses(workers: Sequence[Worker], homes: Sequence[int], active: Sequence[int], *, dealt: bool) -> list[int]:
    """Serve a step of one layer; returns the number of fetches of each worker."""
    at: dict[int, int] = {}
    for rank, worker in enumerate(workers):
        at |= dict.fromkeys((*worker.pinned, *worker.cached), rank)
    missing = [expert for expert in active if expert not in at]
    ranks = deal(missing, homes, [1.0] * len(workers)) if dealt else [homes[expert] for expert in missing]
    at |= dict(zip(missing, ranks, strict=True))
    for rank, worker in enumerate(workers):
        mine = [expert for expert in active if at[expert] == rank]
        worker.step(mine, [expert for expert in mine if expert in missing])
    return [ranks.count(rank) for rank in range(len(workers))]


def waits(test: Trace, placement: Placement, device: int, batch: int, *, dealt: bool) -> float:
    """Fetches waited for, summed over layers; the mean of the steps after the first ones."""
    steps = decoding_steps(test, min(batch, len(test.request_lengths)), MOST_STEPS)
    skip, total = int(WARM_UP * len(steps)), 0.0
    for layer in range(test.num_layers):
        homes = [0] * test.num_experts
        workers = []
        for rank, worker in enumerate(placement.workers):
            for expert in placement.experts_of(worker.id, layer):
                homes[expert] = rank
            pins = placement.resident(worker.id, layer)
            workers.append(Worker(pins, max(1, device - len(pins)), test.num_experts))
        slowest = [max(misses(workers, homes, active, dealt=dealt)) for active in active_experts(test, steps, layer)]
        total += statistics.mean(slowest[skip:])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device-experts", type=int, nargs="+", default=[4, 8], help="experts per layer and worker")
    parser.add_argument("--step-tokens", type=int, default=8)
    args = parser.parse_args()
    print("| trace, experts in memory | planner | waits | dealt | less |\n|---|---|---|---|---|")
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
                placed, dealt = (
                    waits(test, placement, device, args.step_tokens, dealt=dealt) for dealt in (False, True)
                )
                share = 1 - dealt / placed
                print(f"| {path.stem}, {device} | {planner} | {placed:.1f} | {dealt:.1f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
