"""Measures what counting routing decisions costs a worker: CPU time of a step's counts, to compare with the step's
time.

python -m tests.bench.routing_counts [--layers 12] [--experts 32] [--choices 4]
"""

from __future__ import annotations

import argparse
import time

import torch

from elastic_moe.model.exchange.counter import RoutingCounter

STEPS = 100
TOKENS = (1, 8, 32, 64, 512, 2048)


def seconds_per_step(layers: int, experts: int, choices: int, tokens: int) -> float:
    """Of decode steps of `tokens` sequences; more than 64 tokens are one prompt."""
    counter = RoutingCounter(layers, experts)
    index_LTK = torch.randint(experts, (layers, tokens, choices), generator=torch.Generator().manual_seed(0))
    chunks = [1] * tokens if tokens <= 64 else [tokens]
    begin = time.thread_time()
    for _ in range(STEPS):
        for index_TK in index_LTK:
            counter.note(index_TK[None])
        counter.commit_step(chunks)
    return (time.thread_time() - begin) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--choices", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for tokens in TOKENS:
        took_s = seconds_per_step(options.layers, options.experts, options.choices, tokens)
        print(f"{tokens:4} tokens: {1e3 * took_s:.3f} ms a step")


if __name__ == "__main__":
    main()
