"""MoETuner's two ILPs, one after the other (Go and Mahajan 2025, "MoETuner: Optimized Mixture of Expert Serving").

ILP 1 clusters the experts of each layer so that the heaviest cluster is as light as possible. The formula as printed
lacks the constraint that every expert is in exactly one cluster; it is here. ILP 2 maps the clusters of each layer to
workers so that tokens which go from a cluster in one layer to one in the next stay on the worker, or else on the
node. Both assume that a token stays where its expert was (`follow`). The paper solves both to a tolerance of 0.025.

No replicas: the paper has none. Clusters take the slots of the worker that they are mapped to, so ILP 2 exchanges
clusters only between workers of equal slots and speed.
"""

from __future__ import annotations

import itertools

import numpy as np
import pyomo.environ as pyo

from elastic_moe.optimizer.baselines.heuristics import pack_layer
from elastic_moe.optimizer.baselines.load_ilp import build_load_model, chosen_workers, start_from
from elastic_moe.optimizer.core.chaining import chained, interchangeable
from elastic_moe.optimizer.core.contract import Budget, Draft, Pace
from elastic_moe.optimizer.core.problem import FloatArray, IntArray, PlacementProblem
from elastic_moe.optimizer.core.result import Termination
from elastic_moe.optimizer.core.solvers import solve
from elastic_moe.optimizer.core.table import room, row_of

TOLERANCE = 0.025


def moetuner_plan(problem: PlacementProblem, budget: Budget) -> Draft:
    """Solve ILP 1 for every layer, then ILP 2. Without time for them, greedy clusters and chaining maps the clusters.

    Raises SolverError where the solver cannot be used.
    """
    pace = Pace(clock=budget.clock)
    cluster_of, balanced = _cluster(problem, budget.share(0.5), pace)
    worker_of, gap = _map_clusters(problem, cluster_of, budget, pace)
    rows = []
    for layer in range(problem.num_layers):
        worker = worker_of[layer][cluster_of[layer]]
        rows.append(row_of(problem, [np.flatnonzero(worker == rank).tolist() for rank in range(len(problem.workers))]))
    done = balanced == problem.num_layers and gap is not None and gap <= TOLERANCE
    mapped = "no time for ILP 2" if gap is None else f"mapped with a gap of {gap:.1%}"
    return Draft(
        table=np.stack(rows),
        reason=f"{balanced} of {problem.num_layers} layers clustered, {mapped}",
        termination=Termination.COMPLETED if done else Termination.DEADLINE,
    )


def _cluster(problem: PlacementProblem, budget: Budget, pace: Pace) -> tuple[IntArray, int]:
    """([L, E] cluster of each expert, number of layers proven within the tolerance). Cluster k fits worker k."""
    clusters, proven = [], 0
    size = problem.num_experts * len(problem.workers)
    for layer in range(problem.num_layers):
        load = problem.loads[layer]
        start = pack_layer(problem, layer)
        if not pace.allows(size, budget.left_s):
            clusters.append(start)
            continue
        with pace.timed(size):
            model = build_load_model(load, problem.speed, room(problem), np.arange(problem.num_experts, dtype=np.int32))
            weight = np.bincount(start, load, len(problem.workers)) / problem.speed
            start_from(model, start, float(weight.max()))
        limit_s = budget.left_s / (problem.num_layers - layer)
        solution = solve(model, solver=budget.solver, time_limit_s=limit_s, gap=TOLERANCE)
        clusters.append(start if solution.objective is None else chosen_workers(model))
        proven += solution.optimal
    return np.stack(clusters), proven


def _map_clusters(
    problem: PlacementProblem, cluster_of: IntArray, budget: Budget, pace: Pace
) -> tuple[IntArray, float | None]:
    """([L, W] worker of each cluster, gap). The gap is None where there was no time for ILP 2."""
    flows = _cluster_flows(problem, cluster_of)
    start = chained(problem, flows)
    width, nodes = len(problem.workers), int(problem.node_of.max()) + 1
    if len(flows) == 0 or width == 1:
        return start, 0.0
    # the factor is 4, because its rows are longer than ILP 1's, and the solver reads a model as slowly as it is built
    if not pace.allows(4 * len(flows) * width**2 * (width + nodes), budget.left_s):
        return start, None
    model = build_mapping_model(problem, flows, start)
    if budget.left_s <= 0:
        return start, None
    solution = solve(model, solver=budget.solver, time_limit_s=0.8 * budget.left_s, gap=TOLERANCE)
    if solution.objective is None:
        return start, 1.0
    gap = 1 - max(solution.bound, 0.0) / max(solution.objective, 1e-12)
    table = [[[model.x[layer, k, w].value for w in model.w] for k in model.k] for layer in model.layers]
    return np.asarray(np.argmax(np.array(table), axis=2), dtype=np.int32), gap


def _cluster_flows(problem: PlacementProblem, cluster_of: IntArray) -> FloatArray:
    """[L-1, W, W] transitions between clusters of adjacent layers."""
    member = np.eye(len(problem.workers))[cluster_of]
    return np.asarray(np.matmul(member[:-1].transpose(0, 2, 1), np.matmul(problem.flows, member[1:])))


def build_mapping_model(problem: PlacementProblem, flows: FloatArray, start: IntArray) -> pyo.ConcreteModel:
    """ILP 2.

    Sets        boundaries b between layers, clusters k, workers w, nodes n
    Variables   x[l, k, w] in {0, 1}: cluster k of layer l on worker w; s[b, k, j, w] and t[b, k, j, n] in [0, 1]:
                clusters k and j on either side of b are both on worker w, on node n
    Objective   min 1 - sum flow[b, k, j] (port s + uplink t) / (all flow, port + uplink): the share of traffic paid
    """
    model = pyo.ConcreteModel()
    width, nodes = len(problem.workers), int(problem.node_of.max()) + 1
    model.layers = pyo.RangeSet(0, len(flows))
    model.b = pyo.RangeSet(0, len(flows) - 1)
    model.k = pyo.RangeSet(0, width - 1)
    model.w = pyo.RangeSet(0, width - 1)
    model.n = pyo.RangeSet(0, nodes - 1)
    model.x = pyo.Var(model.layers, model.k, model.w, domain=pyo.Binary)
    model.s = pyo.Var(model.b, model.k, model.k, model.w, bounds=(0, 1))
    model.t = pyo.Var(model.b, model.k, model.k, model.n, bounds=(0, 1))
    _one_to_one(model, interchangeable(problem))
    if nodes == 1 and interchangeable(problem).all():
        # the names of workers do not matter, so one of all equal relabellings is kept
        for k, w in itertools.product(model.k, model.w):
            model.x[0, k, w].fix(float(start[0, k] == w))
    _stay_on_worker(model)
    _stay_on_node(model, problem.node_of, nodes)
    # MOETuner's model has one bandwidth for each kind of link
    port, uplink = problem.median_port_s, float(np.median(problem.uplink_s))
    total = float(flows.sum()) * (port + (uplink if nodes > 1 else 0.0))
    price = [port / total, uplink / total if nodes > 1 else 0.0]
    model.objective = pyo.Objective(
        expr=1.0
        - sum(
            float(flows[b, k, j])
            * (
                price[0] * sum(model.s[b, k, j, w] for w in model.w)
                + price[1] * sum(model.t[b, k, j, n] for n in model.n)
            )
            for b, k, j in itertools.product(model.b, model.k, model.k)
        )
    )
    _start_mapping(model, start, problem.node_of)
    return model


def _one_to_one(model: pyo.ConcreteModel, allowed: FloatArray) -> None:
    """sum_w x[l, k, w] = 1 and sum_k x[l, k, w] = 1; a cluster only where it fits."""
    model.cluster_once = pyo.Constraint(
        model.layers, model.k, rule=lambda m, layer, k: sum(m.x[layer, k, w] for w in m.w) == 1
    )
    model.worker_once = pyo.Constraint(
        model.layers, model.w, rule=lambda m, layer, w: sum(m.x[layer, k, w] for k in m.k) == 1
    )
    for layer, k, w in itertools.product(model.layers, model.k, model.w):
        if not allowed[k, w]:
            model.x[layer, k, w].fix(0)


def _stay_on_worker(model: pyo.ConcreteModel) -> None:
    """sum_j s[b, k, j, w] <= x[b, k, w] and sum_k s[b, k, j, w] <= x[b+1, j, w]: tight, for a worker holds one
    cluster."""
    model.leave_from = pyo.Constraint(
        model.b, model.k, model.w, rule=lambda m, b, k, w: sum(m.s[b, k, j, w] for j in m.k) <= m.x[b, k, w]
    )
    model.arrive_at = pyo.Constraint(
        model.b, model.k, model.w, rule=lambda m, b, j, w: sum(m.s[b, k, j, w] for k in m.k) <= m.x[b + 1, j, w]
    )


def _stay_on_node(model: pyo.ConcreteModel, node_of: IntArray, nodes: int) -> None:
    """With y[l, k, n] = sum of x[l, k, w] over the workers w of node n: t[b, k, j, n] <= y[b, k, n] and
    <= y[b+1, j, n]; sum_j t[b, k, j, n] <= |n| y[b, k, n] and sum_k t[b, k, j, n] <= |n| y[b+1, j, n], without which
    the relaxation has every pair on one node. All 0 with one node."""
    if nodes == 1:
        model.t.fix(0)
        return
    on = [np.flatnonzero(node_of == n).tolist() for n in range(nodes)]
    model.node_from = pyo.Constraint(
        model.b,
        model.k,
        model.k,
        model.n,
        rule=lambda m, b, k, j, n: m.t[b, k, j, n] <= sum(m.x[b, k, w] for w in on[n]),
    )
    model.node_at = pyo.Constraint(
        model.b,
        model.k,
        model.k,
        model.n,
        rule=lambda m, b, k, j, n: m.t[b, k, j, n] <= sum(m.x[b + 1, j, w] for w in on[n]),
    )
    model.node_room_from = pyo.Constraint(
        model.b,
        model.k,
        model.n,
        rule=lambda m, b, k, n: sum(m.t[b, k, j, n] for j in m.k) <= len(on[n]) * sum(m.x[b, k, w] for w in on[n]),
    )
    model.node_room_at = pyo.Constraint(
        model.b,
        model.k,
        model.n,
        rule=lambda m, b, j, n: sum(m.t[b, k, j, n] for k in m.k) <= len(on[n]) * sum(m.x[b + 1, j, w] for w in on[n]),
    )


def _start_mapping(model: pyo.ConcreteModel, start: IntArray, node_of: IntArray) -> None:
    for layer, k, w in itertools.product(model.layers, model.k, model.w):
        if not model.x[layer, k, w].fixed:
            model.x[layer, k, w].value = float(start[layer, k] == w)
    for b, k, j in itertools.product(model.b, model.k, model.k):
        here, there = int(start[b, k]), int(start[b + 1, j])
        for w in model.w:
            model.s[b, k, j, w].value = float(here == w == there)
        for n in model.n:
            if not model.t[b, k, j, n].fixed:
                model.t[b, k, j, n].value = float(node_of[here] == n == node_of[there])
