"""The price of a placement: one model for planners, simulator and production.

Legend: L MoE layers, E logical experts, W workers, N nodes, K experts per token, B tokens of a step, C scenarios.

Everything is seconds per step of B tokens; counts are scaled by B / tokens of the window. With x[e,w] the share of
expert e's tokens that worker w serves (1 / replicas of e on each holder: the even split of dispatch), and y[f,w]
that of the next layer,

  compute    (1 - tail) mean_c P_c + tail * (mean of the worst quarter of the P_c), both by the scenarios' weights:
             P_c = sum_l  token_expert_s * max_n (t_1 + sum_{k>1} (max(1, k/R) - max(1, (k-1)/R)) t_k)
             for the loads of scenario c, with t_1 >= t_2 >= ... the times load_w / speed_w of the workers of node n,
             load_w = sum_e load_e x[e,w], and R = node_cores: R workers of a node compute at full speed at once, and
             more of them share the cores (or the device) evenly, so the k that are left when k+1 are done run at R/k
             of it, until R are left. With R >= W it is max_w load_w / speed_w. Everything but computing is priced for
             `loads`, the mean of the scenarios; without scenarios they are the only one.
  traffic    sum_l  token_bytes * (busiest link's tokens / its bandwidth), links being every worker's port and every
             node's uplink, each way apart
    home       twice (there and back). A token goes once to each worker that holds one of its experts; n_w tokens go to
               worker w; a token's home is any worker alike. Port in: n_w (1 - 1/W); port out: sum_{v != w} n_v / W;
               uplinks alike, with the node's share of the workers for 1/W. From pair counts n_w = S1^2 / (S1 + S2):
               S1 = sum_e load_e z[e,w], S2 = sum_{e<f} C[e,f] z[e,w] z[f,w] pairs of one token's experts on w, where
               z = (x - 1/W) / (1 - 1/W), as a home that holds a replica keeps its tokens. Exact where the number of a
               token's experts on w is geometric; within some 3 % on real traces with four workers and more.
    follow     the K x K transitions of a token weigh 1/K each: F[v,w] = sum T[e,f] x[e,v] y[f,w] / K.
               Port out: sum_{w != v} F[v,w]; port in and uplinks alike.
  risk       sum_l  token_expert_s * caution * mean_w (var_w / speed_w^2) / (sum_e load_e / sum_w speed_w), in tokens:
             var_w = sum_{e,f} V[e,f] x[e,w] x[f,w], V the covariance of loads between windows: workers whose experts
             rise together are the ones that will be late.
  affinity   `affinity` times the price of the transitions that change worker, both ways through the median port:
             2 token_bytes / worker bandwidth * sum_{v != w} F[v,w] / W. Traffic sees the busiest link, this all.
  migration  expert_bytes * copies / the median port's bandwidth / horizon_steps; a copy is an expert that a worker
             did not hold, or not in its device
  stall      sum_l  max(0, G_l - compute_l), G_l the time in which the slowest worker fetches what does not lie in its
             device (optimizer.core.tiering); 0 where every expert fits
  kv         resident_s for every slot of a device that has an expert, where the KV cache gets the others' memory

n_w is convex in (S1, S2) and homogeneous, which the bounds and the ILP use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elastic_moe.cluster.placement import EMPTY, Placement, Tier
from elastic_moe.optimizer.core.problem import FloatArray, IntArray, PlacementProblem, Semantics
from elastic_moe.optimizer.core.tiering import LevelArray, placed_by
from elastic_moe.optimizer.residency.activity import activity
from elastic_moe.optimizer.subjects.scenarios import blended_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Predicted seconds per step, itemised."""

    compute_s: float
    traffic_s: float
    risk_s: float = 0.0
    affinity_s: float = 0.0
    migration_s: float = 0.0
    stall_s: float = 0.0
    kv_s: float = 0.0

    @property
    def step_s(self) -> float:
        """Seconds of every step under the placement, without the migration to it."""
        return self.compute_s + self.traffic_s + self.risk_s + self.affinity_s + self.stall_s + self.kv_s

    @property
    def realised_s(self) -> float:
        """step_s without risk, for tokens whose load is known because they have come."""
        return self.step_s - self.risk_s

    @property
    def total_s(self) -> float:
        """The sum of all items, which planners minimise."""
        return self.step_s + self.migration_s


def price(problem: PlacementProblem, placement: Placement) -> Cost:
    """The cost of `placement`, whose workers must be the problem's, in the same order."""
    assert placement.workers == problem.workers
    table = placement.physical_to_logical_map
    if problem.tiering is None:
        return price_table(problem, table)
    return price_table(problem, table, problem.tiering.levels(shares(problem, table), placed_by(problem, placement)))


def price_table(problem: PlacementProblem, table: IntArray, levels: LevelArray | None = None) -> Cost:
    """The cost of a slot table [L, S]. `levels` [L, E, W] are the tiers of experts; the best if not given."""
    x = shares(problem, table)
    if problem.tiering is not None and levels is None:
        levels = problem.tiering.levels(x)
    per_layer = layer_costs(problem, x)
    return Cost(
        compute_s=float(per_layer[0].sum()),
        traffic_s=float(per_layer[1].sum()),
        risk_s=float(risk_costs(problem, x).sum()),
        affinity_s=affinity_cost(problem, x),
        migration_s=copies(problem, table, levels) * move_price(problem),
        stall_s=stall_cost(problem, x, levels, per_layer[0]),
        kv_s=0.0 if problem.tiering is None or levels is None else problem.tiering.kv_s(levels),
    )


def step_on_each(problem: PlacementProblem, placement: Placement, cost: Cost) -> tuple[float, ...]:
    """[C] seconds per step under `placement`, whose cost is known, in each scenario: its own computing, and everything
    else as it is priced for their mean."""
    computes = scenario_computes(problem, shares(problem, placement.physical_to_logical_map)).sum(axis=1)
    return tuple(float(cost.step_s - cost.compute_s + compute_s) for compute_s in computes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetches:
    """What workers are expected to fetch in a step."""

    resident_share: float
    """Share of the served experts that lie in a device, 0..1; those of the cache areas included."""
    experts: float
    """Experts that all workers fetch in a step, over all layers."""
    misses: float
    """Share of the experts with tokens in a step that do not lie in a device, 0..1."""


def expected_fetches(problem: PlacementProblem, placement: Placement) -> Fetches:
    """The fetches of a step of `tokens_per_step` tokens; none where every expert fits."""
    x = shares(problem, placement.physical_to_logical_map)
    if problem.tiering is None:
        return Fetches(resident_share=1.0, experts=0.0, misses=0.0)
    levels = problem.tiering.levels(x, placed_by(problem, placement))
    active = activity(problem.tiering.chance[:, :, None] * x, problem.tiering.tokens)
    outside = float(active[levels > Tier.DEVICE].sum())
    return Fetches(
        resident_share=float((levels == Tier.DEVICE).sum() / (x > 0).sum()),
        experts=outside,
        misses=outside / float(active.sum()),
    )


def stall_cost(problem: PlacementProblem, x: FloatArray, levels: LevelArray | None, compute_s: FloatArray) -> float:
    """Seconds per step that layers wait for experts, beyond the time [L] in which they compute."""
    if problem.tiering is None or levels is None:
        return 0.0
    waits = problem.tiering.waits(x, levels)
    return float(np.maximum(waits - compute_s, 0.0).sum())


def shares(problem: PlacementProblem, table: IntArray) -> FloatArray:
    """[L, E, W] share of each expert's tokens that each worker serves."""
    layers, experts, width = problem.num_layers, problem.num_experts, len(problem.workers)
    x = np.zeros((layers, experts + 1, width))  # the last row stands for EMPTY (-1)
    x[np.arange(layers)[:, None], table, problem.owner[None, :]] = 1.0
    x = x[:, :experts]
    return np.asarray(x / x.sum(axis=2, keepdims=True))


def worker_loads(problem: PlacementProblem, x: FloatArray) -> FloatArray:
    """[L, W] tokens that each worker computes."""
    return np.asarray(np.einsum("le,lew->lw", problem.loads, x))


def load_imbalance(problem: PlacementProblem, x: FloatArray) -> FloatArray:
    """[L] time of the slowest worker divided by the time of a perfect split."""
    ideal = problem.loads.sum(axis=1) / problem.speed.sum()
    return np.asarray((worker_loads(problem, x) / problem.speed).max(axis=1) / ideal)


def scenario_computes(problem: PlacementProblem, x: FloatArray) -> FloatArray:
    """[C, L] seconds until the last worker of each layer has computed, in each scenario."""
    loads = np.matmul(problem.scenarios[0].transpose(1, 0, 2), x)
    return np.asarray((problem.token_expert_s * problem.scale)[:, None] * last_end(problem, loads / problem.speed)).T


def last_end(problem: PlacementProblem, alone: FloatArray) -> FloatArray:
    """[...] when the last worker of a layer is done, where each takes `alone` [..., W] if it has a core for itself."""
    if not problem.shares_cores:
        return np.asarray(alone.max(axis=-1))
    ends = []
    for workers in problem.membership.T > 0:
        longest_first = -np.sort(-alone[..., workers], axis=-1)
        ends.append(longest_first @ sharing_weights(longest_first.shape[-1], problem.node_cores))
    return np.asarray(np.max(ends, axis=0))


def sharing_weights(workers: int, cores: float) -> FloatArray:
    """[W] what the time that each worker takes alone adds to the end of a layer; the worker that takes longest comes
    first."""
    slower = np.maximum(1.0, np.arange(1, workers + 1) / cores)
    return np.diff(slower, prepend=0.0)


def layer_costs(problem: PlacementProblem, x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """([L] compute, [L] traffic) seconds. The traffic of `follow` between l and l+1 stands at l; the last is 0."""
    of_scenarios = scenario_computes(problem, x)
    compute = blended_weights(of_scenarios.sum(axis=1), problem.scenarios[1], problem.tail) @ of_scenarios
    if problem.semantics is Semantics.HOME:
        return compute, home_traffic(problem, arrivals(problem, x)) * problem.scale
    traffic = np.zeros(problem.num_layers)
    traffic[:-1] = follow_traffic(problem, flow_between_workers(problem, x)) * problem.scale[:-1]
    return compute, traffic


def arrivals(problem: PlacementProblem, x: FloatArray) -> FloatArray:
    """[L, W] tokens that have an expert on each worker, as if no token were at home there."""
    away = remote_share(x, len(problem.workers))
    load = worker_loads(problem, away)
    together = 0.5 * np.einsum("lew,lew->lw", np.matmul(problem.pairs, away), away)
    return np.asarray(load**2 / np.maximum(load + together, 1e-300))


def remote_share(x: FloatArray, workers: int) -> FloatArray:
    """x without the tokens at home on the worker, which it serves from its own replica if it has one."""
    if workers == 1:
        return np.zeros_like(x)
    return np.asarray(np.where(x > 0, (x - 1 / workers) / (1 - 1 / workers), 0.0))


def home_traffic(problem: PlacementProblem, n: FloatArray) -> FloatArray:
    """[...] seconds of the busiest link for arrivals n [..., W], both ways."""
    width = len(problem.workers)
    total = n.sum(axis=-1, keepdims=True)
    port = (np.maximum(n * (1 - 1 / width), (total - n) / width) * problem.port_s).max(axis=-1)
    if problem.node_of.max() > 0:
        member = problem.membership
        size = member.sum(axis=0) / width
        inside = n @ member
        uplink = (np.maximum(inside * (1 - size), (total - inside) * size) * problem.uplink_s).max(axis=-1)
        port = np.maximum(port, uplink)
    return np.asarray(2 * port)


def flow_between_workers(problem: PlacementProblem, x: FloatArray) -> FloatArray:
    """[L-1, W, W] tokens from each worker to each worker between adjacent layers."""
    return np.asarray(np.matmul(x[:-1].transpose(0, 2, 1), np.matmul(problem.flows, x[1:])) / problem.top_k)


def follow_traffic(problem: PlacementProblem, flow: FloatArray) -> FloatArray:
    """[...] seconds of the busiest link for flows [..., W, W]."""
    port = _busiest_side(flow, problem.port_s)
    if problem.node_of.max() > 0:
        member = problem.membership
        port = np.maximum(port, _busiest_side(member.T @ flow @ member, problem.uplink_s))
    return np.asarray(port)


def _busiest_side(flow: FloatArray, price: FloatArray) -> FloatArray:
    stays = np.diagonal(flow, axis1=-2, axis2=-1)
    out = ((flow.sum(axis=-1) - stays) * price).max(axis=-1)
    into = ((flow.sum(axis=-2) - stays) * price).max(axis=-1)
    return np.asarray(np.maximum(out, into))


def risk_costs(problem: PlacementProblem, x: FloatArray) -> FloatArray:
    """[L] seconds that are charged for load that may shift; 0 where no covariance is known."""
    if problem.load_covariance is None or problem.caution == 0:
        return np.zeros(problem.num_layers)
    variance = np.einsum("lew,lew->lw", np.matmul(problem.load_covariance, x), x)
    return np.asarray((variance / problem.speed**2).sum(axis=1) * risk_price(problem))


def risk_price(problem: PlacementProblem) -> FloatArray:
    """[L] seconds that are charged for a variance of one squared token on a worker of speed 1."""
    ideal = problem.loads.sum(axis=1) / problem.speed.sum()
    return np.asarray(problem.token_expert_s * problem.caution * problem.scale / (ideal * len(problem.workers)))


def affinity_cost(problem: PlacementProblem, x: FloatArray) -> float:
    """Seconds that are charged for all transitions that change worker."""
    if problem.affinity == 0 or problem.num_layers < 2:
        return 0.0
    flow = flow_between_workers(problem, x)
    leaves = flow.sum(axis=(1, 2)) - np.trace(flow, axis1=1, axis2=2)
    return float((leaves * problem.scale[:-1]).sum() * affinity_price(problem))


def affinity_price(problem: PlacementProblem) -> float:
    """Seconds that are charged for one transition that changes worker, through the median port."""
    return 2 * problem.affinity * problem.median_port_s / len(problem.workers)


def move_price(problem: PlacementProblem) -> float:
    """Seconds per step that one copy of an expert costs through the median port, spread over the horizon."""
    per_byte = problem.median_port_s / problem.token_bytes
    return problem.expert_bytes * per_byte / problem.horizon_steps


def held_before(problem: PlacementProblem) -> FloatArray | None:
    """[L, E, W] 1 where a worker has an expert in its device under the current placement; None without one."""
    current = problem.current
    if current is None:
        return None
    held = np.zeros((problem.num_layers, problem.num_experts + 1, len(problem.workers)))
    ranks = {worker.id: rank for rank, worker in enumerate(problem.workers)}
    target = np.array([ranks.get(worker.id, -1) for worker in current.workers])[current.slot_to_worker]
    stay = target >= 0
    table = current.physical_to_logical_map[:, stay]
    inside = current.tiers[:, stay] == Tier.DEVICE
    # the last of the experts stands for EMPTY and for what lies in no device
    held[np.arange(problem.num_layers)[:, None], np.where(inside, table, EMPTY), target[stay][None, :]] = 1.0
    return held[:, : problem.num_experts]


def moves_to(problem: PlacementProblem, placement: Placement) -> int:
    """Number of experts that workers must fetch to get from the current placement to `placement`."""
    before = held_before(problem)
    if before is None or problem.tiering is None:
        return copies(problem, placement.physical_to_logical_map)
    placed = placed_by(problem, placement)
    if placed is None:
        return copies(problem, placement.physical_to_logical_map)
    return int(((placed == Tier.DEVICE) & (before == 0)).sum())


def copies(problem: PlacementProblem, table: IntArray, levels: LevelArray | None = None) -> int:
    """Number of experts that workers must fetch to get from the current placement to `table`; 0 without a current
    one. What does not lie in a device under `levels` [L, E, W] (the best if not given) is not fetched."""
    before = held_before(problem)
    if before is None:
        return 0
    if problem.tiering is not None:
        x = shares(problem, table)
        marks = problem.tiering.marks(x, problem.tiering.levels(x) if levels is None else levels, before)
        return int(((marks == Tier.DEVICE) & (before == 0)).sum())
    layer, slot = np.nonzero(table != EMPTY)
    return int((before[layer, table[layer, slot], problem.owner[slot]] == 0).sum())
