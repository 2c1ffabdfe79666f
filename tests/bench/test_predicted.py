"""The prediction is made of what workers report, and follows the disk's rate."""

import dataclasses

import numpy as np
import pytest

from elastic_moe.cluster.messages.epochs import PhaseCounts, RoutingCounts
from tests.actors.fakes import MODEL
from tests.bench.predicted import predicted, problem_of
from tests.bench.workers import Setup, Times, placed

INFO = dataclasses.replace(MODEL, num_layers=3, num_logical_experts=16, top_k=2, expert_bytes=10**6, trunk_bytes=10**7)


def counted(tokens: int, seed: int) -> Times:
    rng = np.random.default_rng(seed)
    sample = np.stack([[rng.permutation(16)[:2] for _ in range(3)] for _ in range(tokens)]).astype(np.uint8)
    load = np.stack([np.bincount(sample[:, layer].ravel(), minlength=16) for layer in range(3)])
    phases = [PhaseCounts(tokens=0, load=np.zeros_like(load)), PhaseCounts(tokens=tokens, load=load)]
    routing = RoutingCounts(prefill=phases[0], decode=phases[1], sample=sample)
    return Times(step_s=0.01, waited_s=0.0, cpu_s=0.01, routing=routing)


def test_a_disk_of_half_the_rate_makes_steps_wait_twice_as_long() -> None:
    setup = Setup(workers=2, threads=1, pinned=False, device_experts=4)
    placement, measured = placed(INFO, setup), [counted(200, 0), counted(200, 1)]
    steps = [
        predicted(problem_of(INFO, placement, measured, [rate] * 2, 4, 8), placement, INFO, 0.0) for rate in (1e9, 5e8)
    ]
    assert steps[0].step_s > 0
    assert steps[1].step_s == pytest.approx(2 * steps[0].step_s)
    assert steps[0].read_bytes == steps[1].read_bytes
    assert 0.4 < steps[0].missed < 0.7
