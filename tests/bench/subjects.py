"""Many changes of subject, served on a virtual clock: how even the load stays, and which re-placements did harm.

    python -m tests.bench.subjects builtin:bible builtin:code builtin:manual --changes 220

Stretches of the traces follow one another in random order. They are served through the server's own decisions, as by
`emoe simulate`, in several settings: without the memory of subjects and the quick answer, with one, and with both. A
re-placement did harm if the tokens of the next two windows cost more than 2 % more under it than under the placement
before. `oracle` is no setting of the server: it is planned on the very tokens that come next, and moves what it likes.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elastic_moe.cluster.decisions.trials import MOST_HARM, WINDOWS
from elastic_moe.cluster.placement import Placement, Worker, contiguous
from elastic_moe.deploy.launch.builtin import trace_path
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.study.metrics import measure
from elastic_moe.optimizer.study.scenario import make_workers, problem_from_trace
from elastic_moe.optimizer.study.simulate import (
    Change,
    ChangeKind,
    Look,
    SimulationSettings,
    part_of,
    simulate,
    step_cost,
)
from elastic_moe.optimizer.study.traces import Trace, concatenate, load_trace
from tests.bench.machine import where_and_when

SETTINGS = {
    "before": {"memory": False, "quick": False, "prior": False},
    "memory": {"memory": True, "quick": False, "prior": False},
    "quick": {"memory": False, "quick": True, "prior": False},
    "both": {"memory": True, "quick": True, "prior": False},
    "all": {"memory": True, "quick": True},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run showed."""

    imbalance: float
    after_change: float
    """Imbalance in the intervals in which a subject begins."""
    above: float
    """Share of the intervals with an imbalance above 1.3."""
    step_us: float
    changes: int
    quick: int
    harmful: int
    """Changes that made the tokens of the next two windows dearer by more than MOST_HARM, undone or not."""
    undone: int
    moves: int


def stretch(trace: Trace, tokens: int, streams: int, rng: np.random.Generator) -> Trace:
    """`tokens` tokens of requests of the trace, of which `streams` are decoded at a time; requests may come again."""
    ends = np.cumsum(trace.request_lengths)
    starts = ends - trace.request_lengths
    each, columns = -(-tokens // streams), []
    for _ in range(streams):
        rows: list[np.ndarray] = []
        # a stream is in the middle of a request when the stretch begins
        skip = int(rng.integers(0, int(trace.request_lengths.max())))
        while sum(map(len, rows)) < each + skip:
            request = int(rng.integers(0, len(ends)))
            rows.append(np.arange(starts[request], ends[request]))
        columns.append(np.concatenate(rows)[skip : skip + each])
    picked = np.stack(columns, axis=1).ravel()[:tokens]
    return dataclasses.replace(trace, topk_ids=trace.topk_ids[picked], request_lengths=np.array([tokens]))


def stretches(
    traces: Sequence[Trace], changes: int, tokens: tuple[int, int], streams: int, seed: int
) -> tuple[Trace, list[int]]:
    """(`changes` + 1 stretches of the traces, no two of one trace in a row; the token at which each begins)."""
    rng = np.random.default_rng(seed)
    parts: list[Trace] = []
    last, begins = -1, [0]
    for _ in range(changes + 1):
        last = int(rng.choice([number for number in range(len(traces)) if number != last]))
        parts.append(stretch(traces[last], int(rng.integers(*tokens)), streams, rng))
        begins.append(begins[-1] + parts[-1].num_tokens)
    return concatenate(parts), begins[:-1]


def harm_of(change: Change, trace: Trace, settings: SimulationSettings) -> float:
    """Share by which the tokens of the next two windows cost more under the change than under what was before."""
    first = round(change.time_s * settings.tokens_per_s)
    last = min(first + round(WINDOWS * settings.window_s * settings.tokens_per_s), trace.num_tokens)
    if last <= first:
        return 0.0
    served = part_of(trace, first, last)
    return step_cost(served, change.after, settings) / step_cost(served, change.before, settings) - 1


def result_of(
    looks: Sequence[Look], changes: Sequence[Change], trace: Trace, begins: Sequence[int], settings: SimulationSettings
) -> Result:
    carried_out = [change for change in changes if change.kind is not ChangeKind.UNDONE]
    begun_s = np.array(begins[1:]) / settings.tokens_per_s
    fresh = [look.imbalance for look in looks if ((begun_s <= look.time_s) & (begun_s > look.time_s - 30.0)).any()]
    return Result(
        imbalance=float(np.mean([look.imbalance for look in looks])),
        after_change=float(np.mean(fresh or [np.nan])),
        above=float(np.mean([look.imbalance > 1.3 for look in looks])),
        step_us=1e6 * float(np.mean([look.step_cost for look in looks])),
        changes=len(carried_out),
        quick=sum(change.kind is ChangeKind.QUICK for change in carried_out),
        harmful=sum(harm_of(change, trace, settings) > MOST_HARM for change in carried_out),
        undone=len(changes) - len(carried_out),
        moves=sum(change.moves for change in changes),
    )


def oracle(trace: Trace, workers: tuple[Worker, ...], settings: SimulationSettings) -> tuple[float, float, float]:
    """(mean imbalance, share of intervals above 1.3, mean step in us) where each interval is served by a placement
    that was planned on that interval's own tokens."""
    per_look = int(settings.interval_s * settings.tokens_per_s)
    placement: Placement = contiguous(trace.num_layers, trace.num_experts, workers)
    imbalances, costs = [], []
    for begin in range(0, trace.num_tokens - per_look + 1, per_look):
        served = part_of(trace, begin, begin + per_look)
        problem = dataclasses.replace(
            problem_from_trace(served, workers, semantics=settings.semantics, links=settings.links, current=placement),
            load_covariance=None,
        )
        placement = plan(
            problem, planner="auto", deadline_s=settings.deadline_s, seed=settings.seed, clock=settings.clock
        ).placement
        imbalances.append(measure(served, placement).load_imbalance)
        costs.append(step_cost(served, placement, settings))
    return float(np.mean(imbalances)), float(np.mean(np.array(imbalances) > 1.3)), 1e6 * float(np.mean(costs))


def line(name: str, result: Result) -> str:
    one_in = f"1 in {result.changes / result.harmful:.0f}" if result.harmful else "none"
    return (
        f"| {name} | {result.imbalance:.3f} | {result.after_change:.3f} | {result.above:.0%} | {result.step_us:.1f} |"
        f" {result.changes} ({result.quick} quick) | {result.harmful} ({one_in}) | {result.undone} | {result.moves} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", help="trace files, or builtin:SUBJECT")
    parser.add_argument("--changes", type=int, default=220)
    parser.add_argument("--tokens", type=int, nargs=2, default=(10_000, 20_000), help="of a stretch, least and most")
    parser.add_argument("--streams", type=int, default=16, help="requests that are decoded at a time")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--redundant", type=int, default=0)
    parser.add_argument("--rate", type=float, default=60.0, help="tokens per virtual second")
    parser.add_argument("--interval", type=float, default=60.0)
    parser.add_argument("--window", type=float, default=60.0)
    parser.add_argument("--deadline", type=float, default=0.3)
    parser.add_argument("--expert-bytes", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=(*SETTINGS, "oracle"), default=["before", "both"])
    parser.add_argument("--why", action="store_true", help="print the harm and the reason of each change")
    args = parser.parse_args()
    traces = [load_trace(trace_path(path)) for path in args.traces]
    experts = max(trace.num_experts for trace in traces)
    traces = [dataclasses.replace(trace, num_experts=experts) for trace in traces]
    trace, begins = stretches(traces, args.changes, tuple(args.tokens), args.streams, args.seed)
    workers = make_workers(args.workers, nodes=1, num_experts=experts, redundant=args.redundant)
    usual = SimulationSettings(
        deadline_s=args.deadline, interval_s=args.interval, window_s=args.window, tokens_per_s=args.rate,
        expert_bytes=args.expert_bytes, clock=time.process_time,
    )  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in where_and_when().items()))
    print("| | load | in the 30 s after a change | time above 1.3 | step us | re-placements | did harm | undone |"
          " moves |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.settings:
        if name == "oracle":
            imbalance, above, step_us = oracle(trace, workers, usual)
            print(f"| oracle | {imbalance:.3f} | | {above:.0%} | {step_us:.1f} | | | | |", flush=True)
            continue
        settings, changes = dataclasses.replace(usual, **SETTINGS[name]), list[Change]()
        looks = simulate(trace, workers, settings, on_change=changes.append)
        print(line(name, result_of(looks, changes, trace, begins, settings)), flush=True)
        for change in changes if args.why else ():
            print(f"    {change.time_s:7.0f} {change.kind:8} {harm_of(change, trace, settings):+.3f} {change.reason}")


if __name__ == "__main__":
    main()
