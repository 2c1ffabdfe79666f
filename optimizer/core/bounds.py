"""Lower bounds on the cost of every placement of a problem. They are cheap, and do not depend on any planner.

Each item of the cost is bounded by itself, so the sum of the bounds bounds the total; risk and migration are bounded by
0. Computing is bounded for the mean loads of the scenarios: the mean of several loads' prices, and the more their tail,
is never below the price of their mean. A worker with c slots can hold, of one expert's pairs, at most the c - 1
heaviest. Where no expert can have a replica, eigenvalues give a sharper bound (Donath and Hoffman 1973 for the pairs of
a layer; singular values in the same way for the flows between two layers).
"""

from __future__ import annotations

import numpy as np

from elastic_moe.optimizer.core.cost import affinity_price
from elastic_moe.optimizer.core.problem import FloatArray, PlacementProblem, Semantics
from elastic_moe.optimizer.residency.activity import activity


def lower_bound(problem: PlacementProblem) -> float:
    """Seconds per step that no placement can beat."""
    traffic = home_bound(problem) if problem.semantics is Semantics.HOME else follow_bound(problem)
    compute_s = float(compute_bound(problem).sum())
    return max(compute_s, wait_bound(problem)) + float(traffic.sum()) + affinity_bound(problem)


def wait_bound(problem: PlacementProblem) -> float:
    """Least seconds per step that layers wait for experts; 0 where every expert fits.

    A layer waits for at least what its workers fetch on average, by the fastest of their links. The devices together
    hold the experts of all layers that save most, and the host memories the next ones.
    """
    tiering = problem.tiering
    if tiering is None:
        return 0.0
    active = activity(tiering.chance, tiering.tokens)
    disk = active * tiering.disk_s.min()
    host = np.minimum(active * tiering.host_s.min(), tiering.chance * tiering.tokens * tiering.token_s.min())
    waits = np.sort((disk * tiering.weight[:, None]).ravel())[::-1][int(tiering.device.sum()) :]
    cheaper = np.sort((np.maximum(disk - host, 0) * tiering.weight[:, None]).ravel())[::-1]
    saved = float(cheaper[: int(tiering.host.sum())].sum())
    return max(float(waits.sum()) - saved, 0.0)


def compute_bound(problem: PlacementProblem) -> FloatArray:
    """[L] seconds: the largest of an even split over the workers, of one over the nodes' cores, and of the heaviest
    expert, in as many replicas as there are slots for, on the fastest worker."""
    at_once = float(np.minimum(np.bincount(problem.node_of), problem.node_cores).sum())
    ideal = problem.loads.sum(axis=1) / min(float(problem.speed.sum()), at_once * float(problem.speed.max()))
    replicas = min(len(problem.workers), 1 + _spare(problem))
    heaviest = problem.loads.max(axis=1) / (replicas * problem.speed.max())
    return np.asarray(problem.token_expert_s * problem.scale * np.maximum(ideal, heaviest))


def home_bound(problem: PlacementProblem) -> FloatArray:
    """[L] least seconds of traffic where tokens return after every layer (`home`).

    By Cauchy and Schwarz sum_w S1_w^2 / (S1_w + S2_w) >= S1^2 / (S1 + S2) with S1, S2 the sums; the busiest link
    carries at least as much as it would if all links were the same.
    """
    width = len(problem.workers)
    if width == 1:
        return np.zeros(problem.num_layers)
    first = problem.loads.sum(axis=1) - _saved_by_replicas(problem)
    together = np.array([most_together(pairs, _sizes(problem), _spare(problem) == 0) for pairs in problem.pairs])
    arrive = first**2 / np.maximum(first + together, 1e-300)
    # the busiest link has least to do where all links are equally busy
    seconds = arrive * (1 - 1 / width) / (1 / problem.port_s).sum()
    if problem.node_of.max() > 0:
        size = problem.membership.sum(axis=0) / width
        seconds = np.maximum(seconds, arrive / (1 / ((1 - size) * problem.uplink_s)).sum())
    return np.asarray(2 * seconds * problem.scale)


def follow_bound(problem: PlacementProblem) -> FloatArray:
    """[L-1] least seconds of traffic where tokens stay at their expert (`follow`)."""
    seconds = _leaving(problem, _sizes(problem)) / (1 / problem.port_s).sum()
    if problem.node_of.max() > 0:
        room = np.asarray(_sizes(problem) @ problem.membership)
        seconds = np.maximum(seconds, _leaving(problem, room) / (1 / problem.uplink_s).sum())
    return np.asarray(seconds * problem.scale[:-1])


def affinity_bound(problem: PlacementProblem) -> float:
    """Least seconds that are charged for transitions."""
    return float((_leaving(problem, _sizes(problem)) * problem.scale[:-1]).sum() * affinity_price(problem))


def most_together(pairs: FloatArray, sizes: FloatArray, single: bool) -> float:
    """Most pairs (sum over e < f) that workers with `sizes` [W] slots can hold. `single` says that no expert has a
    replica.

    By rows: an expert shares its worker with at most max(sizes) - 1 others. By eigenvalues: sum_w x_w' C x_w is at most
    sum_k lambda_k size_k, both descending, for disjoint x_w.
    """
    most = int(sizes.max())
    by_rows = 0.5 * float(np.sort(pairs, axis=1)[:, -(most - 1) :].sum()) if most > 1 else 0.0
    if not single:
        return by_rows
    # a diagonal shift changes all placements' values by the same; this one evens out the rows, and sharpens the bound
    shift = -pairs.sum(axis=1) / len(pairs)
    values = np.sort(np.linalg.eigvalsh(pairs + np.diag(shift)))[::-1][: len(sizes)]
    filled = _filled(sizes, len(pairs))
    worst = float((np.maximum(values, 0) * filled[: len(values)]).sum())
    return min(by_rows, 0.5 * (worst - float(shift.sum())))


def _filled(sizes: FloatArray, experts: int) -> FloatArray:
    """[W] descending sizes that no split of the experts over the workers majorises: the largest workers are filled
    first."""
    filled, left = [], experts
    for size in np.sort(sizes)[::-1]:
        filled.append(min(float(size), left))
        left -= int(filled[-1])
    return np.array(filled)


def _leaving(problem: PlacementProblem, sizes: FloatArray) -> FloatArray:
    """[L-1] least transitions (divided by K) that change worker, or node, where these have `sizes` slots."""
    most = min(int(sizes.max()), problem.num_experts)
    left = []
    for flow in problem.flows:
        by_rows = np.sort(flow, axis=1)[:, -most:].sum()
        by_columns = np.sort(flow, axis=0)[-most:, :].sum()
        stay = min(by_rows, by_columns)
        if _spare(problem) == 0:
            values = np.linalg.svd(flow, compute_uv=False)[: len(sizes)]
            stay = min(stay, float((values * _filled(sizes, problem.num_experts)[: len(values)]).sum()))
        left.append(max(float(flow.sum() - stay), 0.0))
    return np.array(left) / problem.top_k


def _sizes(problem: PlacementProblem) -> FloatArray:
    return np.array([min(worker.slots, problem.num_experts) for worker in problem.workers], dtype=np.float64)


def _spare(problem: PlacementProblem) -> int:
    """Number of slots per layer that remain for replicas."""
    return int(_sizes(problem).sum()) - problem.num_experts


def _saved_by_replicas(problem: PlacementProblem) -> FloatArray:
    """[L] most load that stays at its home: every replica saves 1 / (W - 1) of its expert's tokens from travelling."""
    width = len(problem.workers)
    heaviest = np.sort(problem.loads, axis=1)[:, ::-1]
    copies = np.full(problem.num_experts, width - 1)
    spare = np.minimum(np.cumsum(copies), _spare(problem))
    used = np.diff(np.concatenate([[0], spare]))
    return np.asarray((heaviest * used).sum(axis=1) / (width - 1))
