"""What it gains to choose replicas by a step's own counts: a replay of traces, nothing measured.

    python -m tests.bench.replicas TRACE.npz --workers 8 --redundant 16 --step-tokens 64

Planned on the first half of the requests, replayed on the second one. Prints what the busiest worker has over the
mean, on average over steps and layers, in tokens and with `--read` for each expert that it reads from memory: where
replicas are taken in turn (by rank alone), where they are chosen by the counts of the step before, and by the step's
own; and what no choice can beat: the optimum of the linear program that splits each expert's tokens among its replicas
at will, which is what DeepSeek's LPLB solves on GPUs; it knows no reading.
"""

from __future__ import annotations

import argparse

import highspy
import numpy as np

from elastic_moe.cluster.placement import Placement
from elastic_moe.deploy.launch.builtin import trace_path
from elastic_moe.model.exchange.dispatcher import held_table, route_table
from elastic_moe.optimizer.buffering.replicas import READ_TOKENS, ReplicaChoice
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.study.scenario import make_workers, problem_from_trace
from elastic_moe.optimizer.study.traces import Trace, load_trace


def counts(trace: Trace, tokens: np.ndarray, layer: int, size: int) -> np.ndarray:
    """[W, E] tokens of each worker, which is home to every `size`-th request, that chose each expert."""
    table = np.zeros((size, trace.num_experts), dtype=np.int64)
    for seat, token in enumerate(tokens):
        np.add.at(table[seat % size], trace.topk_ids[token, layer].astype(np.int64), 1)
    return table


def busiest(tokens_WE: np.ndarray, ranks_WE: np.ndarray, read: int) -> float:
    """What the busiest worker has, over the mean if each expert were read once."""
    size = len(tokens_WE)
    load = np.bincount(ranks_WE[tokens_WE > 0], tokens_WE[tokens_WE > 0], size)
    for rank in range(size):
        load[rank] += read * ((ranks_WE == rank) & (tokens_WE > 0)).any(axis=0).sum()
    total = tokens_WE.sum() + read * (tokens_WE.sum(axis=0) > 0).sum()
    return float(load.max() / (total / size))


def optimum(tokens_E: np.ndarray, holds_WE: np.ndarray) -> float:
    """The least load of the busiest worker over the mean, if each expert's tokens may be split at will."""
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    peak = model.addVariable(lb=0.0, obj=1.0)
    rows: list[list[highspy.highs.highs_var]] = [[] for _ in holds_WE]
    for expert in np.flatnonzero(tokens_E):
        parts = [model.addVariable(lb=0.0) for _ in range(int(holds_WE[:, expert].sum()))]
        for rank, part in zip(np.flatnonzero(holds_WE[:, expert]), parts, strict=True):
            rows[rank].append(part)
        model.addConstr(sum(parts[1:], parts[0] + 0.0) == float(tokens_E[expert]))
    for row in rows:
        if row:
            model.addConstr(sum(row[1:], row[0] + 0.0) <= peak)
    model.run()
    return float(model.getObjectiveValue()) / (tokens_E.sum() / len(holds_WE))


def steps_of(trace: Trace, batch: int, number: int) -> list[np.ndarray]:
    """[B] tokens of each step: `batch` requests, each from a place of its own on, as prompts begin alike."""
    starts = np.random.default_rng(0).integers(0, trace.num_tokens - number, batch)
    return [starts + step for step in range(number)]


def replay(trace: Trace, placement: Placement, batch: int, number: int, read: int) -> np.ndarray:
    """[4] mean over steps and layers: by rank, by the step before, by the step's own counts, the optimum."""
    size = len(placement.workers)
    routes = np.stack([route_table(placement, rank).numpy() for rank in range(size)])
    seen = []
    steps = steps_of(trace, batch, number)
    for layer in range(trace.num_layers):
        holds = held_table(placement)[layer]
        choice = ReplicaChoice(holds)
        before = None
        for tokens in steps:
            now = counts(trace, tokens, layer, size)
            own = choice.ranks(now)
            late = routes[:, layer] if before is None else before
            figures = [busiest(now, ranks, read) for ranks in (routes[:, layer], late, own)]
            seen.append([*figures, np.nan if read else optimum(now.sum(axis=0), holds)])
            before = own
    return np.mean(seen, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--redundant", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--step-tokens", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--read", type=int, nargs="+", default=[0, READ_TOKENS], help="tokens that a reading counts")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--deadline", type=float, default=2.0)
    args = parser.parse_args()
    print("| trace | redundant | requests | read | by rank | step before | own counts | optimum |\n" + 8 * "|---" + "|")
    for name in args.traces:
        profile, test = load_trace(trace_path(name)).halves()
        for redundant in args.redundant:
            workers = make_workers(args.workers, nodes=1, num_experts=profile.num_experts, redundant=redundant)
            placement = plan(problem_from_trace(profile, workers), planner="auto", deadline_s=args.deadline).placement
            for batch in args.step_tokens:
                for read in args.read:
                    found = replay(test, placement, batch, args.steps, read)
                    figures = " | ".join(f"{figure:.3f}" for figure in found)
                    print(f"| {name.rpartition('/')[2]} | {redundant} | {batch} | {read} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
