"""Replays a trace through caches of experts: miss rates and waiting times by policy, placement and size.

The figures 12 and 13 of Huang et al. 2023 ("Towards MoE Deployment") are drawn from its rows. The policies are the ones
that workers run (optimizer.buffering); the steps are those of a server that decodes several requests at once.

Legend: T tokens, L MoE layers, E logical experts, W workers.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.placement import EMPTY, Placement
from elastic_moe.optimizer.buffering.belady import fewest_misses
from elastic_moe.optimizer.buffering.policies import DEFAULT_POLICY, POLICIES, make_policy
from elastic_moe.optimizer.buffering.simulate import CacheCounts, Step, replay
from elastic_moe.optimizer.buffering.static import Static
from elastic_moe.optimizer.core.problem import PlacementProblem
from elastic_moe.optimizer.study.steps import active_experts, decoding_steps
from elastic_moe.optimizer.study.traces import Trace

CURVES = (*POLICIES, "static", "min")
"""The policies of a server, the experts that a profile counted most often, and Belady's MIN."""

WARM_UP = 0.25
"""Share of the steps, the first ones, that fill the caches and are not counted."""

MOST_STEPS = 320
"""Most steps of a replay: more change the rates by less than the requests of a trace differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRow:
    """One policy in caches of one size under one placement."""

    placement: str
    policy: str
    batch: int
    share: float
    """Slots of a cache, as a share of the experts that its worker serves in the layer."""
    miss_rate: float
    """Share of all accesses that missed."""
    worst_miss_rate: float
    """Miss rate of the worst layer of a worker."""
    fetches: float
    """Experts that the slowest worker fetches, summed over the layers of a step; mean over steps."""
    step_s: float
    """Seconds of a step: those of a step with all experts resident, or of the fetches where these take longer."""
    memory_bytes: int
    """Experts in the caches of the worker that has the most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTimes:
    """What a step takes."""

    compute_s: float
    """Seconds of a layer where all experts are resident."""
    fetch_s: float
    """Seconds to bring one expert."""
    expert_bytes: int


class WorkerSteps:
    """The steps of a trace as every worker's layers see them."""

    def __init__(self, trace: Trace, profile: Trace, placement: Placement, batch: int) -> None:
        steps = decoding_steps(trace, batch, MOST_STEPS)
        self.batch = batch
        self.num_experts = trace.num_experts
        self.skip = int(WARM_UP * len(steps))
        counted = [np.bincount(ids.ravel(), minlength=trace.num_experts) for ids in profile.topk_ids.transpose(1, 0, 2)]
        self.weights = np.array(counted, dtype=np.float64)
        """[L, E] how often the profile chose each expert."""
        self.layers = [
            _by_worker(active_experts(trace, steps, layer), placement, layer) for layer in range(trace.num_layers)
        ]
        """[L][W] the experts of a worker in a layer, and its active ones in each step."""


def _by_worker(steps: list[list[int]], placement: Placement, layer: int) -> list[tuple[list[int], list[Step]]]:
    """A replica serves only on the first worker that holds it."""
    parts: list[tuple[list[int], list[Step]]] = []
    taken: set[int] = set()
    for worker in placement.workers:
        held = [e for e in placement.experts_of(worker.id, layer) if e != EMPTY and e not in taken]
        taken |= set(held)
        mine = frozenset(held)
        parts.append((held, [[expert for expert in step if expert in mine] for step in steps]))
    return parts


def cache_sizes(seen: WorkerSteps, share: float) -> list[list[int]]:
    """[L][W] the experts that a cache of `share` of what a worker serves in a layer holds: at least one."""
    return [[max(1, round(share * len(held))) for held, _ in workers] for workers in seen.layers]


def cache_row(seen: WorkerSteps, name: str, policy: str, slots: Sequence[Sequence[int]], times: CacheTimes) -> CacheRow:
    """Run `policy` (one of CURVES) in caches of `slots` [L][W] experts."""
    runs: list[list[CacheCounts]] = []
    for layer, (workers, sizes) in enumerate(zip(seen.layers, slots, strict=True)):
        runs.append([_run(policy, seen, layer, steps, size) for size, (_, steps) in zip(sizes, workers, strict=True)])
    served = sum(len(held) for workers in seen.layers for held, _ in workers)
    flat = [run for layer_runs in runs for run in layer_runs]
    misses = np.array([[run.misses_by_step for run in layer_runs] for layer_runs in runs])
    slowest: npt.NDArray[np.int64] = misses.max(axis=1)
    step_s = np.maximum(slowest * times.fetch_s, times.compute_s).sum(axis=0)
    return CacheRow(
        placement=name,
        policy=policy,
        batch=seen.batch,
        share=sum(map(sum, slots)) / served,
        miss_rate=sum(run.accesses - run.hits for run in flat) / max(sum(run.accesses for run in flat), 1),
        worst_miss_rate=max(run.miss_rate for run in flat),
        fetches=float(slowest.sum(axis=0).mean()),
        step_s=float(step_s.mean()),
        memory_bytes=max(map(sum, zip(*slots, strict=True))) * times.expert_bytes,
    )


def _run(name: str, seen: WorkerSteps, layer: int, steps: Sequence[Step], slots: int) -> CacheCounts:
    if name == "min":
        return fewest_misses(steps, slots, skip=seen.skip)
    static = name == "static"
    policy = Static(seen.weights[layer].tolist()) if static else make_policy(name, seen.num_experts)
    return replay(steps, policy, slots, skip=seen.skip)


def write_rows(path: Path, rows: Iterable[CacheRow]) -> None:
    """Write one line per row, with every field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(CacheRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What the tiers of a placement made of a trace."""

    miss_rate: float
    """Share of accesses to experts that were in no device."""
    fetches: float
    """Experts that the slowest worker fetches, summed over the layers of a step; mean over steps."""


def replay_problem(trace: Trace, problem: PlacementProblem, placement: Placement) -> Replayed:
    """The tiers of `placement` on a trace, as many requests at once as the problem's steps have tokens, and as the
    trace has requests, under the default policy."""
    batch = min(problem.tokens_per_step, len(trace.request_lengths))
    device = [memory.device_experts for memory in problem.memory]
    return replay_placement(trace, placement, device, batch, DEFAULT_POLICY)


def replay_placement(
    trace: Trace, placement: Placement, device_experts: Sequence[int], batch: int, policy: str
) -> Replayed:
    """Run the steps of `batch` requests: the experts that the placement has in devices are pinned, and what they leave
    of each worker's `device_experts` (over all layers) is dealt evenly to the layers as cache areas under `policy`."""
    steps = decoding_steps(trace, batch, MOST_STEPS)
    skip = int(WARM_UP * len(steps))
    pins = [[placement.resident(w.id, layer) for w in placement.workers] for layer in range(trace.num_layers)]
    parts = [_by_worker(active_experts(trace, steps, layer), placement, layer) for layer in range(trace.num_layers)]
    runs = []
    areas = [_areas(pins, parts, rank, experts) for rank, experts in enumerate(device_experts)]
    for layer, workers in enumerate(parts):
        runs.append(
            [
                replay(served, make_policy(policy, trace.num_experts), areas[rank][layer], pinned=pin, skip=skip)
                for rank, ((_, served), pin) in enumerate(zip(workers, pins[layer], strict=True))
            ]
        )
    flat = [run for layer_runs in runs for run in layer_runs]
    misses = np.array([[run.misses_by_step for run in layer_runs] for layer_runs in runs])
    return Replayed(
        miss_rate=sum(run.accesses - run.hits for run in flat) / max(sum(run.accesses for run in flat), 1),
        fetches=float(misses.max(axis=1).sum(axis=0).mean()),
    )


def _areas(
    pins: list[list[tuple[int, ...]]], parts: list[list[tuple[list[int], list[Step]]]], rank: int, experts: int
) -> list[int]:
    """[L] slots of the cache area of each layer of a worker."""
    whole = [len(parts[layer][rank][0]) <= len(pins[layer][rank]) for layer in range(len(pins))]
    spare = experts - sum(len(layer[rank]) for layer in pins)
    passing = max(whole.count(False), 1)
    turn = iter(range(passing))
    return [1 if full else max(1, (spare + passing - 1 - next(turn)) // passing) for full in whole]
