"""Permutes the contents of workers layer by layer so that tokens stay on their worker from one layer to the next.

The chain is quick and needs no solver. MoETuner's second ILP and the local search start from it.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.optimizer.core.assignment import assign
from elastic_moe.optimizer.core.cost import flow_between_workers, shares
from elastic_moe.optimizer.core.problem import FloatArray, IntArray, PlacementProblem


def chained(problem: PlacementProblem, flows: FloatArray) -> IntArray:
    """[L, W] worker of each cluster. `flows` [L-1, W, W] are the transitions between the clusters of adjacent layers.

    Each layer's clusters are assigned to the workers of the layer before. Cluster k fits worker k.
    """
    worker_of = [np.arange(len(problem.workers), dtype=np.int32)]
    allowed, save = interchangeable(problem), kept(problem)
    for flow in flows:
        gain = flow.T @ save[worker_of[-1]]
        worker_of.append(assign(np.where(allowed > 0, -gain, 1.0 + gain.sum())))
    return np.stack(worker_of)


def lined_up(problem: PlacementProblem, table: IntArray) -> IntArray:
    """The table [L, S] after whole contents of workers were exchanged in each layer, which leaves the balance as it
    is."""
    worker_of = chained(problem, flow_between_workers(problem, shares(problem, table)))
    new = table.copy()
    for layer, target in enumerate(worker_of):
        for cluster, worker in enumerate(target):
            new[layer, problem.owner == worker] = table[layer, problem.owner == cluster]
    return new


def interchangeable(problem: PlacementProblem) -> FloatArray:
    """[W, W] 1 where two workers have the same slots, speed, memory and port: each can take the other's experts."""
    memories = [problem.memory.index(memory) for memory in problem.memory] or [0] * len(problem.workers)
    slots = [worker.slots for worker in problem.workers]
    kind = np.column_stack([slots, problem.speed, memories, problem.port_s])
    return np.asarray((kind[:, None, :] == kind[None, :, :]).all(axis=2).astype(np.float64))


def kept(problem: PlacementProblem) -> FloatArray:
    """[W, W] seconds that one token saves where it goes from worker v to w and not to another node."""
    member = problem.membership
    near = (member * problem.uplink_s) @ member.T * float(member.shape[1] > 1)
    return np.asarray(near + np.diag(problem.port_s))
