"""The cost model against its formulas written as loops; what the search sees against the cost model."""

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.placement import EMPTY, contiguous
from elastic_moe.optimizer.baselines.heuristics import greedy_table, random_table
from elastic_moe.optimizer.core.cost import copies, price_table, remote_share, shares
from elastic_moe.optimizer.core.problem import Links, PlacementProblem, Semantics
from elastic_moe.optimizer.search.layer_prices import LayerPricer
from elastic_moe.optimizer.search.swaps import BARRED, LayerTerms, best_swaps, swap_deltas
from tests.optimizer.cases import tiny


def by_loops(problem: PlacementProblem, table: np.ndarray) -> float:
    """Every item of the cost, straight from the docstring."""
    width, top_k = len(problem.workers), problem.top_k
    nodes = sorted({w.node for w in problem.workers})
    rates = problem.links.ports_gbps or [problem.links.worker_gbps] * width
    port = [problem.token_bytes * 8 / (rate * 1e9) for rate in rates]
    rates = problem.links.uplinks_gbps or [problem.links.node_gbps] * len(nodes)
    up = [problem.token_bytes * 8 / (rate * 1e9) for rate in rates]
    on = {n: [w for w in range(width) if problem.workers[w].node == n] for n in nodes}
    total = 0.0
    held = [[set(row[problem.owner == w].tolist()) - {EMPTY} for w in range(width)] for row in table]

    def x(layer: int, e: int, w: int) -> float:
        return (e in held[layer][w]) / sum(e in mine for mine in held[layer])

    experts = range(problem.num_experts)
    flows, computes = [], [0.0] * (1 if problem.scenario_loads is None else len(problem.scenario_loads))
    for layer in range(problem.num_layers):
        scale = problem.tokens_per_step / (problem.loads[layer].sum() / top_k)
        for c, given_loads in enumerate([problem.loads] if problem.scenario_loads is None else problem.scenario_loads):
            same = problem.loads[layer].sum() / given_loads[layer].sum()
            load = [sum(same * given_loads[layer, e] * x(layer, e, w) for e in experts) for w in range(width)]
            alone = [load[w] / problem.speed[w] for w in range(width)]
            end = max(end_by_sharing([alone[w] for w in ranks], problem.node_cores) for ranks in on.values())
            computes[c] += problem.token_expert_s * scale * end
        if problem.load_covariance is not None:
            ideal = problem.loads[layer].sum() / problem.speed.sum()
            for w in range(width):
                var = sum(
                    problem.load_covariance[layer, e, f] * x(layer, e, w) * x(layer, f, w)
                    for e in experts
                    for f in experts
                )
                total += problem.token_expert_s * problem.caution * scale * var / problem.speed[w] ** 2 / ideal / width
        n = []
        for w in range(width):
            z = [(x(layer, e, w) - 1 / width) / (1 - 1 / width) if e in held[layer][w] else 0.0 for e in experts]
            s1 = sum(problem.loads[layer, e] * z[e] for e in experts)
            s2 = sum(problem.coactivation[layer, e, f] * z[e] * z[f] for e, f in itertools.combinations(experts, 2))
            n.append(s1**2 / (s1 + s2) if s1 else 0.0)
        if problem.semantics is Semantics.HOME:
            links = [port[w] * max(n[w] * (1 - 1 / width), (sum(n) - n[w]) / width) for w in range(width)]
            for node, ranks in enumerate(on.values()) if len(nodes) > 1 else ():
                inside, size = sum(n[w] for w in ranks), len(ranks) / width
                links.append(up[node] * max(inside * (1 - size), (sum(n) - inside) * size))
            total += 2 * scale * max(links)
        if layer + 1 < problem.num_layers:
            flow = np.zeros((width, width))
            for v, w, e, f in itertools.product(range(width), range(width), experts, experts):
                flow[v, w] += problem.transitions[layer, e, f] * x(layer, e, v) * x(layer + 1, f, w) / top_k
            flows.append(flow)
            total += 2 * problem.affinity * np.median(port) / width * scale * (flow.sum() - np.trace(flow))
            if problem.semantics is Semantics.FOLLOW:
                groups = [([w], port[w]) for w in range(width)] + (
                    list(zip(on.values(), up, strict=True)) if len(nodes) > 1 else []
                )
                links = []
                for ranks, price in groups:
                    out = sum(flow[v, w] for v in ranks for w in range(width) if w not in ranks)
                    into = sum(flow[v, w] for v in range(width) for w in ranks if v not in ranks)
                    links += [price * out, price * into]
                total += scale * max(links)
    return total + mean_and_worst_quarter(computes, problem.scenario_weights, problem.tail)


def end_by_sharing(alone: list[float], cores: float) -> float:
    """When the last of some workers is done: those that have something left share the cores evenly."""
    left, now = list(alone), 0.0
    while any(one > 1e-9 for one in left):
        busy = [w for w, one in enumerate(left) if one > 1e-9]
        speed = min(1.0, cores / len(busy))
        took = min(left[w] for w in busy) / speed
        now += took
        for w in busy:
            left[w] -= took * speed
    return now


def mean_and_worst_quarter(computes: list[float], weights: tuple[float, ...], tail: float) -> float:
    weights = weights or (1.0,) * len(computes)
    left = quarter = sum(weights) / 4
    worst = 0.0
    for price, weight in sorted(zip(computes, weights, strict=True), reverse=True):
        taken = min(weight, left)
        worst, left = worst + taken * price, left - taken
    mean = sum(p * w for p, w in zip(computes, weights, strict=True)) / sum(weights)
    return (1 - tail) * mean + tail * worst / quarter


@pytest.mark.parametrize(
    ("uneven", "scenarios", "node_cores"), [(False, 0, math.inf), (True, 0, 1.0), (False, 3, 1.5), (True, 7, 2.0)]
)
@pytest.mark.parametrize("semantics", Semantics)
@pytest.mark.parametrize(
    ("workers", "nodes", "slots"), [(2, 1, ()), (3, 1, (2, 2, 2)), (4, 2, (1, 2, 2, 1)), (3, 3, (4, 1, 2))]
)
def test_cost_is_its_formulas(
    semantics: Semantics,
    workers: int,
    nodes: int,
    slots: tuple[int, ...],
    uneven: bool,
    scenarios: int,
    node_cores: float,
) -> None:
    rng = np.random.default_rng(1)
    links = Links(ports_gbps=(1.0, 20.0, 0.3, 5.0)[:workers], uplinks_gbps=(2.0, 0.1, 7.0)[:nodes])
    problem = tiny(
        3,
        workers=workers,
        nodes=nodes,
        slots=slots,
        semantics=semantics,
        speeds=(1.0, 2.0, 0.5, 1.5)[:workers],
        node_cores=node_cores,
        links=links if uneven else Links(),
        scenarios=scenarios,
        tail=0.3,
    )
    for table in (random_table(problem, rng), greedy_table(problem, rng)):
        assert price_table(problem, table).total_s == pytest.approx(by_loops(problem, table), rel=1e-9)


def test_copies_count_what_workers_lack() -> None:
    problem = tiny(0, layers=1)
    current = contiguous(1, 4, problem.workers)
    moved = tiny(0, layers=1, current=current, expert_bytes=10**9)
    assert copies(moved, np.array([[0, 1, 2, 3]], dtype=np.int32)) == 0
    assert copies(moved, np.array([[1, 0, 3, 2]], dtype=np.int32)) == 0
    assert copies(moved, np.array([[0, 2, 1, 3]], dtype=np.int32)) == 2
    assert copies(problem, np.array([[0, 2, 1, 3]], dtype=np.int32)) == 0
    assert price_table(moved, np.array([[0, 2, 1, 3]], dtype=np.int32)).migration_s > 0


def test_a_home_keeps_the_tokens_of_its_replica() -> None:
    x = np.array([[[1.0, 0.0], [0.5, 0.5]]])
    assert remote_share(x, 2).tolist() == [[[1.0, 0.0], [0.0, 0.0]]]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from(
        [(2, 1, (2, 2)), (2, 1, (3, 2)), (3, 1, (2, 2, 2)), (4, 2, (1, 1, 2, 1)), (4, 2, (2, 2, 2, 2))]
    ),
    semantics=st.sampled_from(list(Semantics)),
    fields=st.sampled_from([{}, {"covariance": False}, {"affinity": 0.0}, {"scenarios": 5}, {"node_cores": 1.5}]),
    uneven=st.booleans(),
)
def test_what_the_search_sees_of_a_layer_is_the_cost_of_changing_it(
    seed: int, shape: tuple[int, int, tuple[int, ...]], semantics: Semantics, fields: dict[str, Any], uneven: bool
) -> None:
    """`around_s` changes with one layer exactly as the total does, and no barred swap leaves a legal table illegal."""
    workers, nodes, slots = shape
    links = Links(ports_gbps=(1.0, 20.0, 0.3, 5.0)[:workers], uplinks_gbps=(2.0, 0.1)[:nodes]) if uneven else Links()
    problem = tiny(
        seed, layers=3, workers=workers, nodes=nodes, slots=slots, semantics=semantics, links=links, **fields
    )
    rng = np.random.default_rng(seed)
    table = greedy_table(problem, rng)
    pricer = LayerPricer(problem, table)
    layer = int(rng.integers(3))
    deltas = swap_deltas(pricer.terms(layer, 3, 2), table[layer])
    assert np.allclose(deltas, deltas.T, equal_nan=True)
    i, j = (int(k) for k in rng.integers(len(table[layer]), size=2))
    if deltas[i, j] == BARRED:
        return
    before, around = price_table(problem, table).total_s, pricer.around_s(layer)
    table[layer, [i, j]] = table[layer, [j, i]]
    pricer.update(table, layer)
    change = price_table(problem, table).total_s - before
    assert pricer.around_s(layer) - around == pytest.approx(change, abs=1e-12)
    assert np.allclose(pricer.x, shares(problem, table))


def potential(terms: LayerTerms, row: np.ndarray, frozen: np.ndarray) -> float:
    """The potential of `row`, norms frozen at the row `frozen`: powers, straight from the docstring."""
    held = row != EMPTY
    replicas = np.maximum(np.bincount(row[held], minlength=len(terms.load_s)), 1)
    share = np.where(held, 1 / replicas[row], 0.0)

    def busy(load_s: np.ndarray, slots: np.ndarray) -> np.ndarray:
        return np.bincount(terms.owner, load_s[slots] * np.where(slots != EMPTY, 1 / replicas[slots], 0)) / terms.speed

    def links(slots: np.ndarray) -> np.ndarray:
        arrive = terms.arrivals(slots, terms.shares(slots))
        return np.concatenate([arrive * terms.arrival_s, np.bincount(terms.node, arrive * terms.uplink_s)])

    total = float((terms.place_s[row, terms.owner] * share).sum())
    busies = [(partial(busy, load_s), 2**terms.load_power) for load_s in terms.scenario_s]
    for quantity, power in (*busies, (links, 2**terms.link_power)):
        norm = (quantity(frozen) ** power).sum() ** (1 / power)
        if norm > 0:
            total += norm / power * ((quantity(row) / norm) ** power).sum()
    if terms.covariance_s is not None:
        shares_on = np.zeros((len(terms.load_s), len(terms.speed)))
        shares_on[row[held], terms.owner[held]] = share[held]
        variance = np.einsum("ew,ew->w", terms.covariance_s @ shares_on, shares_on)
        total += float((variance / terms.speed**2).sum())
    return total


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(2, 1, (2, 2)), (3, 1, (2, 2, 2)), (4, 2, (1, 1, 2, 1)), (4, 2, (2, 2, 2, 2))]),
    semantics=st.sampled_from(list(Semantics)),
    scenarios=st.sampled_from([0, 4]),
)
def test_swap_deltas_are_changes_of_the_potential(
    seed: int, shape: tuple[int, int, tuple[int, ...]], semantics: Semantics, scenarios: int
) -> None:
    workers, nodes, slots = shape
    given = {"speeds": (1.0, 1.5, 1.0, 2.0)[:workers], "scenarios": scenarios}
    problem = tiny(seed, layers=2, workers=workers, nodes=nodes, slots=slots, semantics=semantics, **given)
    table = greedy_table(problem, np.random.default_rng(seed))
    terms = LayerPricer(problem, table).terms(0, 3, 2)
    row = table[0]
    deltas = swap_deltas(terms, row)
    for i, j in itertools.combinations(range(len(row)), 2):
        if deltas[i, j] == BARRED:
            continue
        after = row.copy()
        after[[i, j]] = row[[j, i]]
        change = potential(terms, after, row) - potential(terms, row, row)
        assert deltas[i, j] == pytest.approx(change, rel=1e-6, abs=1e-15)


def test_swaps_done_at_once_share_no_worker() -> None:
    deltas = np.full((4, 4), -1.0)
    swaps = best_swaps(deltas, np.array([0, 1, 2, 3], dtype=np.int32), 0.0)
    assert len(swaps) == 2
    assert len({worker for swap in swaps for worker in swap}) == 4
