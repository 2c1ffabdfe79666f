"""Tiny problems, and the optimum of each by trying every placement."""

import itertools
from collections.abc import Iterator

import numpy as np

from elastic_moe.cluster.placement import Worker, WorkerId
from elastic_moe.optimizer.core.cost import price_table
from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem, Semantics
from elastic_moe.optimizer.core.table import row_of
from elastic_moe.optimizer.subjects.scenarios import mean_of_scenarios


def tiny(
    seed: int = 0,
    *,
    layers: int = 2,
    experts: int = 4,
    workers: int = 2,
    nodes: int = 1,
    slots: tuple[int, ...] = (),
    semantics: Semantics = Semantics.HOME,
    covariance: bool = True,
    scenarios: int = 0,
    **fields: object,
) -> PlacementProblem:
    """Random but consistent statistics: counted from tokens that choose two experts. With `scenarios`, the loads are
    the mean of that many subjects of unlike sizes and weights."""
    rng = np.random.default_rng(seed)
    tokens, top_k = 60, min(2, experts)
    taste = rng.dirichlet(np.ones(experts), size=(layers, 3)) + 0.02
    theme = rng.integers(3, size=tokens)
    chosen = np.zeros((layers, tokens, experts))
    for layer, token in itertools.product(range(layers), range(tokens)):
        p = taste[layer, theme[token]]
        chosen[layer, token, rng.choice(experts, top_k, replace=False, p=p / p.sum())] = 1
    deviation = chosen[:, :30].sum(1) - chosen[:, 30:].sum(1)
    given = {
        "loads": chosen.sum(1),
        "transitions": np.matmul(chosen[:-1].transpose(0, 2, 1), chosen[1:]),
        "coactivation": np.matmul(chosen.transpose(0, 2, 1), chosen),
        "load_covariance": deviation[:, :, None] * deviation[:, None, :] if covariance else None,
        "top_k": top_k,
        "semantics": semantics,
        "workers": tuple(
            Worker(id=WorkerId(f"w{w}"), node=f"n{w * nodes // workers}", slots=s)
            for w, s in enumerate(slots or (-(-experts // workers),) * workers)
        ),
    }
    if scenarios:
        subjects = rng.dirichlet(np.ones(experts), size=(scenarios, layers)) * rng.integers(10, 100, (scenarios, 1, 1))
        weights = tuple(rng.uniform(0.5, 2.0, scenarios))
        mean = mean_of_scenarios(subjects, weights, np.full(layers, float(tokens * top_k)))
        given |= {"loads": mean, "scenario_loads": subjects, "scenario_weights": weights}
    return PlacementProblem(**(given | fields))


def every_row(problem: PlacementProblem) -> Iterator[IntArray]:
    """Every way to fill the slots of one layer, replicas included."""
    width = len(problem.workers)
    holders = [c for r in range(1, width + 1) for c in itertools.combinations(range(width), r)]
    for choice in itertools.product(holders, repeat=problem.num_experts):
        held = [[e for e in range(problem.num_experts) if w in choice[e]] for w in range(width)]
        if all(len(mine) <= worker.slots for mine, worker in zip(held, problem.workers, strict=True)):
            yield row_of(problem, held)


def every_table(problem: PlacementProblem) -> Iterator[IntArray]:
    rows = list(every_row(problem))
    for combination in itertools.product(rows, repeat=problem.num_layers):
        yield np.stack(combination)


def optimum(problem: PlacementProblem) -> float:
    """The least total cost of all placements."""
    return min(price_table(problem, table).total_s for table in every_table(problem))
