"""The sets of the joint program (optimizer/ilp/joint.py), and how large it would be."""

from __future__ import annotations

import numpy as np

from elastic_moe.optimizer.core.cost import remote_share
from elastic_moe.optimizer.core.problem import FloatArray, PlacementProblem, Semantics


def modes(problem: PlacementProblem) -> list[tuple[int, int]]:
    """(expert, replicas) for every number of replicas that the slots allow."""
    spare = sum(min(worker.slots, problem.num_experts) for worker in problem.workers) - problem.num_experts
    most = min(len(problem.workers), 1 + spare)
    return [(e, r) for e in range(problem.num_experts) for r in range(1, most + 1)]


def size(problem: PlacementProblem) -> int:
    """Number of products that the model would have, with which its time grows."""
    count, width = len(modes(problem)), len(problem.workers)
    pairs = problem.num_layers * count * (count - 1) // 2 * width
    fetched = 0
    if problem.tiering is not None:
        outside = count * width * (2 if problem.tiering.host.any() else 1)
        fetched = problem.num_layers * outside * (outside - 1) // 2
    return pairs + fetched + (problem.num_layers - 1) * count**2 * len(near_pairs(problem))


def near_pairs(problem: PlacementProblem) -> list[tuple[int, int]]:
    """Pairs of workers with cheaper traffic: a worker and itself, and under `follow` also two workers of one node."""
    width, node = len(problem.workers), problem.node_of
    if problem.semantics is Semantics.HOME or node.max() == 0:
        return [(w, w) for w in range(width)]
    return [(v, w) for v in range(width) for w in range(width) if node[v] == node[w]]


def links(problem: PlacementProblem) -> list[tuple[list[int], float]]:
    """The ranks behind every port and every uplink, with the seconds that one token takes on it."""
    ports = [([w], float(price)) for w, price in enumerate(problem.port_s)]
    # for a single node there are fewer groups than prices
    return [*ports, *zip(_node_ranks(problem), problem.uplink_s.tolist(), strict=False)]


def _node_ranks(problem: PlacementProblem) -> list[list[int]]:
    """Ranks of the workers of every node; empty for a single node, whose uplink carries nothing."""
    nodes = int(problem.node_of.max()) + 1
    return [np.flatnonzero(problem.node_of == n).tolist() for n in range(nodes)] if nodes > 1 else []


def arrival_slopes(problem: PlacementProblem, x: FloatArray) -> FloatArray:
    """[L, W] the slope t = S1 / (S1 + S2) of every worker at which a tangent is exact; 1 where nothing arrives."""
    away = remote_share(x, len(problem.workers))
    first = np.einsum("le,lew->lw", problem.loads, away)
    together = 0.5 * np.einsum("lew,lew->lw", np.matmul(problem.pairs, away), away)
    return np.asarray(np.where(first > 0, first / np.maximum(first + together, 1e-300), 1.0))
