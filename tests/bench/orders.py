"""Traces in every order, one after another on a virtual clock: how even the server's decisions keep the load.

    python -m tests.bench.orders A.npz B.npz C.npz --workers 8

The deadline is counted in seconds of this process, so other programs do not change the plans. The placement begins
contiguous. For each order it prints the load imbalance of each interval; the last line has the means over all orders.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence

import numpy as np

from elastic_moe.deploy.launch.builtin import trace_path
from elastic_moe.optimizer.study.scenario import make_workers
from elastic_moe.optimizer.study.simulate import Look, SimulationSettings, simulate
from elastic_moe.optimizer.study.traces import Trace, concatenate, load_trace
from tests.bench.machine import where_and_when

UNEVEN = 1.3
"""Load imbalance above which an interval counts as uneven."""


def uneven_s(looks: Sequence[Look], first: Trace, settings: SimulationSettings) -> float:
    """Seconds of uneven intervals after the first trace has ended."""
    begun_s = first.num_tokens / settings.tokens_per_s
    return settings.interval_s * sum(look.imbalance > UNEVEN and look.time_s > begun_s for look in looks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=trace_path, nargs="+", help="trace files, or builtin:SUBJECT")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--deadline", type=float, default=SimulationSettings().deadline_s)
    args = parser.parse_args()
    traces = {path.stem: load_trace(path) for path in args.traces}
    settings = SimulationSettings(deadline_s=args.deadline, clock=time.process_time)
    workers = make_workers(args.workers, nodes=1, num_experts=max(trace.num_experts for trace in traces.values()))
    print(", ".join(f"{key} {value}" for key, value in where_and_when().items()))
    loads, steps, uneven, moves = list[list[float]](), list[float](), list[float](), list[int]()
    for order in itertools.permutations(traces):
        looks = simulate(concatenate([traces[name] for name in order]), workers, settings)
        loads.append([look.imbalance for look in looks])
        steps += [look.step_cost / look.step_cost_static for look in looks]
        uneven.append(uneven_s(looks, traces[order[0]], settings))
        moves.append(sum(look.moves for look in looks))
        print(
            f"{' '.join(order)}: {np.mean(loads[-1]):.3f}: {' '.join(f'{load:.2f}' for load in loads[-1])}", flush=True
        )
    print(
        f"load {np.mean(loads):.3f}, step {np.mean(steps):.3f} of the contiguous placement's,"
        f" {np.mean(uneven):.0f} s above {UNEVEN} after the first trace, {np.mean(moves):.0f} moves in an order"
    )


if __name__ == "__main__":
    main()
