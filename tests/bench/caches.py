"""How well do the cache policies do? `python -m tests.bench.caches TRACE..`: hit rates by trace, batch and cache size.

Each cell is the share of accesses that hit, over the chosen layers. *static* holds the experts that the first half of the
requests chose most often; it is measured on all requests, half of which it knows. *min* is the bound.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from elastic_moe.deploy.launch.builtin import trace_path
from elastic_moe.optimizer.buffering.belady import fewest_misses
from elastic_moe.optimizer.buffering.policies import POLICIES, make_policy
from elastic_moe.optimizer.buffering.simulate import CacheCounts, Step, replay
from elastic_moe.optimizer.buffering.static import Static
from elastic_moe.optimizer.study.steps import active_experts, decoding_steps
from elastic_moe.optimizer.study.traces import Trace, load_trace

CAUSAL = (*POLICIES, "static")
COLUMNS = (*CAUSAL, "min")
SHARES = (0.25, 0.5)
MOST_STEPS = 300


def _run(policy: str, steps: list[Step], slots: int, weights: np.ndarray) -> CacheCounts:
    skip = len(steps) // 4
    if policy == "min":
        return fewest_misses(steps, slots, skip=skip)
    made = Static(weights.tolist()) if policy == "static" else make_policy(policy, len(weights))
    return replay(steps, made, slots, skip=skip)


def hit_rates(trace: Trace, batch: int, share: float, layers: list[int]) -> dict[str, float]:
    """Share of accesses that hit, by policy."""
    steps, profile = decoding_steps(trace, batch, MOST_STEPS), trace.halves()[0]
    slots = round(share * trace.num_experts)
    runs: dict[str, list[CacheCounts]] = {policy: [] for policy in COLUMNS}
    for layer in layers:
        weights = np.bincount(profile.topk_ids[:, layer].ravel(), minlength=trace.num_experts)
        active: list[Step] = list(active_experts(trace, steps, layer))
        for policy, found in runs.items():
            found.append(_run(policy, active, slots, weights))
    return {
        policy: sum(run.hits for run in found) / sum(run.accesses for run in found) for policy, found in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Hit rates of the cache policies on routing traces.")
    parser.add_argument("traces", nargs="+", type=trace_path)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--layers", default="2,12,22", help="layers of each trace (2,12,22)")
    args = parser.parse_args()
    print("| trace, batch, cache | " + " | ".join(COLUMNS) + " | lfru to the best causal | to min |")
    print("|" + "---|" * (len(COLUMNS) + 3))
    for path in args.traces:
        trace = load_trace(Path(path))
        layers = [int(layer) for layer in args.layers.split(",") if int(layer) < trace.num_layers]
        for batch in (int(batch) for batch in args.batches.split(",")):
            for share in SHARES if batch <= len(trace.request_lengths) else ():
                rates = hit_rates(trace, batch, share, layers)
                best = max(rates[policy] for policy in CAUSAL)
                cells = " | ".join(f"{rates[policy]:.3f}" for policy in COLUMNS)
                far = f"{rates['lfru'] / best - 1:+.1%} | {rates['lfru'] / rates['min'] - 1:+.1%}"
                print(f"| {Path(path).stem}, {batch}, {share:.0%} | {cells} | {far} |", flush=True)


if __name__ == "__main__":
    main()
