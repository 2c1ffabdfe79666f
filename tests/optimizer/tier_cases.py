"""Tiny problems whose experts do not fit, and the optimum of each by trying every table and every choice of tiers."""

import itertools
from collections.abc import Iterator

import numpy as np

from elastic_moe.cluster.placement import Tier
from elastic_moe.optimizer.core.cost import price_table, shares
from elastic_moe.optimizer.core.problem import PlacementProblem
from elastic_moe.optimizer.core.tiering import NOT_HELD, LevelArray
from elastic_moe.optimizer.residency.memory import WorkerMemory
from tests.optimizer.cases import every_table, tiny

US = 1e-6


def tight(
    seed: int = 0, *, device: int = 3, host: int = 0, cache: int = 1, rent_s: float = 0.0, **fields: object
) -> PlacementProblem:
    """A tiny problem in which every worker's device holds `device` experts over all layers."""
    workers = int(fields.get("workers", 2))
    memory = WorkerMemory(
        device_experts=device,
        host_experts=host,
        disk_fetch_s=50 * US,
        host_fetch_s=8 * US,
        cache_slots=cache,
        resident_s=rent_s,
    )
    return tiny(seed, **({"memory": (memory,) * workers, "tokens_per_step": 4} | fields))


def every_level(problem: PlacementProblem, table: np.ndarray) -> Iterator[LevelArray]:
    """Every way to lay out the experts of a table over the tiers, with a slot for those that pass."""
    x = shares(problem, table)
    choices = [_of_worker(problem, x[:, :, rank] > 0, rank) for rank in range(len(problem.workers))]
    for combination in itertools.product(*choices):
        yield np.stack(combination, axis=2)


def _of_worker(problem: PlacementProblem, served: np.ndarray, rank: int) -> list[LevelArray]:
    memory = problem.memory[rank]
    layer, expert = np.nonzero(served)
    found = []
    for tiers in itertools.product((Tier.DEVICE, Tier.HOST, Tier.DISK), repeat=len(layer)):
        level = np.full(served.shape, NOT_HELD, dtype=np.int8)
        level[layer, expert] = tiers
        passing = int((level > Tier.DEVICE).any(axis=1).sum())
        fits = int((level == Tier.DEVICE).sum()) + passing <= memory.device_experts
        if fits and int((level == Tier.HOST).sum()) <= memory.host_experts:
            found.append(level)
    return found


def tiered_optimum(problem: PlacementProblem) -> float:
    """The least total cost of all tables and tiers."""
    return min(
        price_table(problem, table, levels).total_s
        for table in every_table(problem)
        for levels in every_level(problem, table)
    )
