"""The cost model for one layer while the others stay: prices for swaps, and the true cost around a layer.

Legend: E experts, W workers, N nodes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from elastic_moe.optimizer.core.cost import (
    affinity_price,
    follow_traffic,
    held_before,
    home_traffic,
    last_end,
    move_price,
    price_table,
    remote_share,
    risk_price,
    scenario_computes,
    shares,
)
from elastic_moe.optimizer.core.problem import FloatArray, IntArray, PlacementProblem, Semantics
from elastic_moe.optimizer.search.fetches import LayerFetch
from elastic_moe.optimizer.search.swaps import LayerTerms
from elastic_moe.optimizer.subjects.scenarios import blended_weights


class LayerPricer:
    """Keeps the shares x [L, E, W] of a table, from which it computes the prices of a layer."""

    def __init__(self, problem: PlacementProblem, table: IntArray) -> None:
        self.problem = problem
        self.x = shares(problem, table)
        self._computes = scenario_computes(problem, self.x)
        self.typical_s = self.total_s(table) / problem.num_layers
        self._before = held_before(problem)
        self._first_slot = np.cumsum([0] + [w.slots for w in problem.workers])[:-1].astype(np.int32)
        self._arrival_s, self._uplink_s = _arrival_prices(problem)
        self._traffic = bool(self._arrival_s.any())
        width = len(problem.workers)
        self._member = problem.membership
        self._apart = 1.0 - np.eye(width)
        self._far = 1.0 - self._member @ self._member.T
        self._risk_price = risk_price(problem)
        self.settle(table)

    def settle(self, table: IntArray) -> None:
        """Deal each worker's fast memory over the layers again, as is best for the table."""
        self._room: tuple[IntArray, IntArray] | None = None
        if self.problem.tiering is not None:
            tiering = self.problem.tiering
            self._room = tiering.rooms(tiering.levels(shares(self.problem, table)))

    def _fetch(self, layer: int) -> LayerFetch | None:
        tiering = self.problem.tiering
        if tiering is None or self._room is None:
            return None
        return LayerFetch(
            chance=tiering.chance[layer],
            tokens=tiering.tokens,
            disk_s=tiering.disk_s,
            host_s=tiering.host_s,
            token_s=tiering.token_s,
            room=self._room[0][layer],
            host_room=self._room[1][layer],
            active=tiering.active[layer],
            covariance=tiering.covariance[layer],
            slope=float(tiering.slope[layer]),
            steep=float(tiering.steep[layer]),
            own=tiering.own,
            rest_s=float(tiering.rest_s[layer]),
        )

    def total_s(self, table: IntArray) -> float:
        """The true cost of the whole table."""
        return price_table(self.problem, table).total_s

    def update(self, table: IntArray, layer: int) -> None:
        """Update the shares of a layer that has changed in the table."""
        x = np.zeros((self.problem.num_experts + 1, len(self.problem.workers)))  # the last row stands for EMPTY
        x[table[layer], self.problem.owner] = 1.0
        self.x[layer] = x[:-1] / x[:-1].sum(axis=1, keepdims=True)
        self._computes[:, layer] = self._compute(layer)

    def _compute(self, layer: int) -> FloatArray:
        """[C] seconds until the last worker of the layer has computed, in each scenario."""
        load = self.problem.scenarios[0][:, layer] @ self.x[layer]
        end = last_end(self.problem, load / self.problem.speed)
        return np.asarray(self.problem.token_expert_s * self.problem.scale[layer] * end)

    def scenario_weights(self) -> FloatArray:
        """[C] weight of each scenario in the price of the present table."""
        return blended_weights(self._computes.sum(axis=1), self.problem.scenarios[1], self.problem.tail)

    def around_s(self, *layers: int) -> float:
        """The true cost of some layers and of the traffic among them and to their neighbours, plus the computing of the
        other layers in which the worst scenarios differ from their mean."""
        boundaries = {b for layer in layers for b in self._boundaries(layer)}
        # what the worst scenarios are depends on all layers
        weights = self.scenario_weights()
        around = sum(self._layer_s(layer, weights) for layer in layers) + self._elsewhere_s(layers, weights)
        return around + sum(self._boundary_s(b) for b in sorted(boundaries))

    def _elsewhere_s(self, layers: tuple[int, ...], weights: FloatArray) -> float:
        """Seconds of computing outside `layers` in which the scenarios under `weights` differ from their mean."""
        if len(weights) == 1:
            return 0.0
        return float((weights - self.problem.scenarios[1]) @ np.delete(self._computes, layers, axis=1).sum(axis=1))

    def _layer_s(self, layer: int, weights: FloatArray) -> float:
        problem, x = self.problem, self.x[layer]
        scale = problem.scale[layer]
        total = float(weights @ self._computes[:, layer])
        fetch = self._fetch(layer)
        if fetch is not None:
            total = max(total, float(fetch.waits(x).max()))
        if problem.load_covariance is not None:
            variance = np.einsum("ew,ew->w", problem.load_covariance[layer] @ x, x) / problem.speed**2
            total += float(variance.sum() * self._risk_price[layer])
        if problem.semantics is Semantics.HOME:
            away = remote_share(x, len(problem.workers))
            first = problem.loads[layer] @ away
            together = 0.5 * np.einsum("ew,ew->w", problem.pairs[layer] @ away, away)
            arrive = first**2 / np.maximum(first + together, 1e-300)
            total += float(home_traffic(problem, arrive) * scale)
        if self._before is not None:
            moved = (x > 0) & (self._before[layer] == 0)
            total += move_price(problem) * float((moved if self._room is None else moved[self._fetched(layer)]).sum())
        return total

    def _fetched(self, layer: int) -> npt.NDArray[np.bool_]:
        """[E] the experts that a worker which gets them brings into its device: the most active ones."""
        assert self._room is not None
        loads = self.problem.loads[layer]
        fetched = np.zeros(len(loads), dtype=bool)
        fetched[np.argsort(-loads, kind="stable")[: int(self._room[0][layer].sum())]] = True
        return fetched

    def _boundaries(self, layer: int) -> list[int]:
        return [b for b in (layer - 1, layer) if 0 <= b < self.problem.num_layers - 1]

    def _flow(self, boundary: int) -> FloatArray:
        """[W, W] tokens of a step from each worker to each."""
        problem = self.problem
        flow = self.x[boundary].T @ (problem.flows[boundary] @ self.x[boundary + 1])
        return np.asarray(flow * (problem.scale[boundary] / problem.top_k))

    def _boundary_s(self, boundary: int) -> float:
        flow = self._flow(boundary)
        affinity_s = float((flow * self._apart).sum()) * affinity_price(self.problem)
        if self.problem.semantics is Semantics.FOLLOW:
            return affinity_s + float(follow_traffic(self.problem, flow))
        return affinity_s

    def terms(self, layer: int, load_power: int, link_power: int, eagerness: float = 1.0) -> LayerTerms:
        """The terms that judge swaps within `layer`. `eagerness` multiplies the prices between layers."""
        problem, scale = self.problem, self.problem.scale[layer]
        covariance = None
        if problem.load_covariance is not None and problem.caution > 0:
            covariance = problem.load_covariance[layer] * self._risk_price[layer]
        weights = self.scenario_weights()
        counted = weights > 0
        scenario_s = weights[counted, None] * problem.scenarios[0][counted, layer] * (scale * problem.token_expert_s)
        return LayerTerms(
            scenario_s=scenario_s,
            load_s=scenario_s.sum(axis=0),
            tokens=problem.loads[layer] * scale,
            pairs=problem.pairs[layer] * scale,
            arrival_s=self._arrival_s,
            uplink_s=self._uplink_s,
            traffic=self._traffic,
            covariance_s=covariance,
            place_s=self.place_prices(layer, link_power, eagerness),
            owner=problem.owner,
            first_slot=self._first_slot,
            speed=problem.speed,
            node=problem.node_of,
            fetch=self._fetch(layer),
            load_power=load_power,
            link_power=link_power,
        )

    def place_prices(self, layer: int, link_power: int, eagerness: float = 1.0) -> FloatArray:
        """[E, W] seconds for each expert on each worker: transitions to both neighbours, and migration."""
        problem = self.problem
        prices = np.zeros((problem.num_experts, len(problem.workers)))
        for boundary in self._boundaries(layer):
            toll = self._tolls(boundary, link_power) * (eagerness * problem.scale[boundary] / problem.top_k)
            if boundary == layer:
                prices += problem.flows[boundary] @ (self.x[layer + 1] @ toll.T)
            else:
                prices += problem.flows[boundary].T @ (self.x[layer - 1] @ toll)
        if self._before is not None:
            # swaps scale prices by the item's share of its expert's tokens; a copy costs the same for any share
            replicas = (self.x[layer] > 0).sum(axis=1, keepdims=True)
            moves = move_price(problem) * (1.0 - self._before[layer]) * replicas
            prices += moves if self._room is None else np.where(self._fetched(layer)[:, None], moves, 0.0)
        return prices

    def _tolls(self, boundary: int, link_power: int) -> FloatArray:
        """[W, W] seconds of a token from worker v to w: the price of affinity, and under `follow` the slope of the norm
        of all links."""
        problem = self.problem
        affinity = np.asarray(self._apart * affinity_price(problem))
        if problem.semantics is Semantics.HOME:
            return affinity
        flow = self._flow(boundary)
        away, across = flow * self._apart, flow * self._far
        ports = [away.sum(axis=1) * problem.port_s, away.sum(axis=0) * problem.port_s]
        uplinks = [
            (self._member.T @ across.sum(axis=1)) * problem.uplink_s,
            (self._member.T @ across.sum(axis=0)) * problem.uplink_s,
        ]
        port_out, port_in, up_out, up_in = _norm_slopes([*ports, *uplinks], 2**link_power)
        port, uplink = problem.port_s, problem.uplink_s
        toll = affinity + self._apart * ((port_out * port)[:, None] + (port_in * port)[None, :])
        up_out, up_in = self._member @ (up_out * uplink), self._member @ (up_in * uplink)
        toll += self._far * (up_out[:, None] + up_in[None, :])
        return np.asarray(toll)


def _norm_slopes(links: list[FloatArray], power: int) -> list[FloatArray]:
    """The slope of the p-norm of all links by the seconds of each link, scaled to the busiest link.

    The norm itself is larger where many links are nearly as busy, and its slope would price them too high.
    """
    seconds = np.concatenate(links)
    peak = max(float(seconds.max()), 1e-300)
    norm = peak * max(float(((seconds / peak) ** power).sum()), 1.0) ** (1 / power)  # 0 where nothing leaves a worker
    return np.split((peak / norm) * (seconds / norm) ** (power - 1), np.cumsum([len(link) for link in links])[:-1])


def _arrival_prices(problem: PlacementProblem) -> tuple[FloatArray, FloatArray]:
    """([W] on the port, [W] on the uplink) seconds of one token that arrives at a worker and returns; 0 under
    `follow`."""
    width = len(problem.workers)
    if problem.semantics is Semantics.FOLLOW or width == 1:
        return np.zeros(width), np.zeros(width)
    port = np.asarray(2 * (1 - 1 / width) * problem.port_s)
    if problem.node_of.max() == 0:
        return port, np.zeros(width)
    size = problem.membership.sum(axis=0) / width
    return port, np.asarray((2 * problem.uplink_s * (1 - size))[problem.node_of])
