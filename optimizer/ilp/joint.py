"""The whole problem as one mixed-integer program, which is exact. It suits small problems.

Sets        layers l, experts e, workers w, replica counts r
Variables   u[l, e, r, w] in {0, 1}: e has r replicas in layer l, and w holds one; v[l, e, r] in {0, 1}: e has r
replicas
            products p of two u of one layer, and s of two u of adjacent layers, in [0, 1] peak[l], arrive[l, w],
            link[l] >= 0: time of the slowest worker, tokens that arrive, time of the busiest link
Objective   the cost model's total (optimizer.core.cost), item by item

With mode m = (e, r) a worker's share of e is u / r, so every item is linear in u, p and s; only arrivals S1^2 / (S1 +
S2) are convex. They are met from below by tangents 2 t S1 - t^2 (S1 + S2), one for each t in (0, 1], and more are
added at the incumbent until the model's objective is the true cost. Every solve's bound is a bound on the true cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyomo.environ as pyo

from elastic_moe.cluster.placement import Tier
from elastic_moe.optimizer.core.cost import (
    affinity_price,
    held_before,
    move_price,
    risk_price,
)
from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem, Semantics
from elastic_moe.optimizer.core.table import row_of
from elastic_moe.optimizer.core.tiering import NOT_HELD, LevelArray, Tiering
from elastic_moe.optimizer.ilp.joint_sets import links, modes, near_pairs
from elastic_moe.optimizer.ilp.tiers import Served, add_tiers, both, fetched, fit, on_disk, start_tiers

MICRO = 1e6
"""Microseconds in a second."""

FIRST_TANGENTS = (0.3, 0.5, 0.7, 0.9, 1.0)


class JointModel:
    """The Pyomo model of a problem; it can turn its variables back into a table.

    Times are in microseconds: solvers' tolerances are absolute, and seconds would drown in them.
    """

    def __init__(self, problem: PlacementProblem) -> None:
        self.problem = problem
        self.modes = modes(problem)
        self._near = near_pairs(problem)
        self.model = pyo.ConcreteModel()
        self._declare()
        self._replicas_agree()
        self._respect_room()
        self._order_alike_workers()
        self._products()
        self._bound_by_peak()
        if problem.tiering is not None:
            self._wait_for_experts(problem.tiering)
        if problem.semantics is Semantics.HOME and len(problem.workers) > 1:
            self._arrivals()
        if problem.semantics is Semantics.FOLLOW and len(problem.workers) > 1:
            self._follow_links()
        self.model.objective = pyo.Objective(expr=self._total())

    def _declare(self) -> None:
        model, problem = self.model, self.problem
        model.layers = pyo.RangeSet(0, problem.num_layers - 1)
        model.w = pyo.RangeSet(0, len(problem.workers) - 1)
        model.m = pyo.RangeSet(0, len(self.modes) - 1)
        model.u = pyo.Var(model.layers, model.m, model.w, domain=pyo.Binary)
        model.v = pyo.Var(model.layers, model.m, domain=pyo.Binary)
        model.peak = pyo.Var(model.layers, bounds=(0, None))
        model.link = pyo.Var(model.layers, bounds=(0, None))
        model.tangents = pyo.ConstraintList()
        model.links = pyo.ConstraintList()

    def _replicas_agree(self) -> None:
        """sum_r v[l, e, r] = 1 and sum_w u[l, e, r, w] = r v[l, e, r]."""
        model, modes = self.model, self.modes
        model.one_count = pyo.Constraint(
            model.layers,
            range(self.problem.num_experts),
            rule=lambda m, layer, e: sum(m.v[layer, k] for k, mode in enumerate(modes) if mode[0] == e) == 1,
        )
        model.all_placed = pyo.Constraint(
            model.layers,
            model.m,
            rule=lambda m, layer, k: sum(m.u[layer, k, w] for w in m.w) == modes[k][1] * m.v[layer, k],
        )

    def _respect_room(self) -> None:
        """sum over modes of u[l, m, w] <= slots_w."""
        self.model.room = pyo.Constraint(
            self.model.layers,
            self.model.w,
            rule=lambda m, layer, w: sum(m.u[layer, k, w] for k in m.m) <= self.problem.workers[w].slots,
        )

    def _order_alike_workers(self) -> None:
        """load of w >= load of w + 1 in layer 0, for neighbours that differ only in their names. It keeps one of all
        equal relabellings."""
        problem, model = self.problem, self.model
        if problem.current is not None:
            return
        model.order = pyo.ConstraintList()
        loads = [
            sum(float(problem.loads[0, e] / r) * model.u[0, k, w] for k, (e, r) in enumerate(self.modes))
            for w in model.w
        ]
        port = problem.port_s
        for w, (one, other) in enumerate(itertools.pairwise(problem.workers)):
            alike = (one.slots, one.node, problem.speed[w]) == (other.slots, other.node, problem.speed[w + 1])
            if alike and port[w] == port[w + 1] and len(set(problem.memory[w : w + 2])) < 2:
                model.order.add(loads[w] >= loads[w + 1])

    def _products(self) -> None:
        """p <= u, p <= u', p >= u + u' - 1 for two modes of one layer on one worker; s alike for two layers, near
        workers.

        Only where a statistic is not 0; the lower side only where more of the product costs more.
        """
        model, problem = self.model, self.problem
        model.p = pyo.Var(self._pair_index(), bounds=(0, 1))
        model.s = pyo.Var(self._flow_index(), bounds=(0, 1))
        model.product = pyo.ConstraintList()
        for layer, k, j, w in model.p:
            pair = model.p[layer, k, j, w]
            model.product.add(pair <= model.u[layer, k, w])
            model.product.add(pair <= model.u[layer, j, w])
            if problem.load_covariance is not None:
                model.product.add(pair >= model.u[layer, k, w] + model.u[layer, j, w] - 1)
        for layer, k, j, v, w in model.s:
            model.product.add(model.s[layer, k, j, v, w] <= model.u[layer, k, v])
            model.product.add(model.s[layer, k, j, v, w] <= model.u[layer + 1, j, w])

    def _pair_index(self) -> list[tuple[int, int, int, int]]:
        problem, modes = self.problem, self.modes
        wanted = problem.pairs > 0 if problem.semantics is Semantics.HOME else np.zeros(problem.pairs.shape, dtype=bool)
        if problem.load_covariance is not None and problem.caution > 0:
            wanted = wanted | (problem.load_covariance != 0)
        return [
            (layer, k, j, w)
            for layer in range(problem.num_layers)
            for k, j in itertools.combinations(range(len(modes)), 2)
            if modes[k][0] != modes[j][0] and wanted[layer, modes[k][0], modes[j][0]]
            for w in range(len(problem.workers))
        ]

    def _flow_index(self) -> list[tuple[int, int, int, int, int]]:
        problem, modes = self.problem, self.modes
        if problem.semantics is Semantics.HOME and problem.affinity == 0:
            return []
        return [
            (layer, k, j, v, w)
            for layer in range(problem.num_layers - 1)
            for k, j in itertools.product(range(len(modes)), repeat=2)
            if problem.flows[layer, modes[k][0], modes[j][0]] > 0
            for v, w in self._near
        ]

    def _bound_by_peak(self) -> None:
        """token_expert_s sum_m load_e / r u[l, m, w] / speed_w <= peak[l]."""
        problem = self.problem

        def rule(m: Any, layer: int, w: int) -> Any:
            price = MICRO * problem.token_expert_s * problem.scale[layer] / problem.speed[w]
            load = sum(problem.loads[layer, e] / r * m.u[layer, k, w] for k, (e, r) in enumerate(self.modes))
            return float(price) * load <= m.peak[layer]

        self.model.slowest = pyo.Constraint(self.model.layers, self.model.w, rule=rule)

    def _wait_for_experts(self, tiering: Tiering) -> None:
        """own F[l, w] + slope sum_v F[l, v] + steep s2[l] + rest <= peak[l], F what w fetches, s2 its variance; the
        rooms."""
        problem, model = self.problem, self.model
        width = len(problem.workers)
        prices = {r: tiering.fetch_prices(np.full((*problem.loads.shape, width), 1 / r)) for _, r in self.modes}
        self._items = {
            (layer, w): [
                Served(
                    key=(layer, k, w),
                    served=model.u[layer, k, w],
                    passing=(layer, w),
                    disk=float(MICRO * prices[r][0][layer, e, w]),
                    host=float(MICRO * prices[r][1][layer, e, w]),
                )
                for k, (e, r) in enumerate(self.modes)
            ]
            for layer, w in itertools.product(model.layers, model.w)
        }
        add_tiers(model, [item for items in self._items.values() for item in items], list(self._items))
        for w in model.w:
            mine = [item for layer in model.layers for item in self._items[layer, w]]
            fit(model, mine, [(layer, w) for layer in model.layers], int(tiering.device[w]), int(tiering.host[w]))
        for layer in model.layers:
            seconds = [fetched(model, self._items[layer, w]) for w in model.w]
            spread = MICRO * float(tiering.rest_s[layer]) + float(tiering.slope[layer]) * sum(seconds)
            spread += float(tiering.steep[layer]) * self._variance(tiering, layer)
            for each in seconds:
                model.tiers.add(tiering.own * each + spread <= model.peak[layer])

    def _variance(self, tiering: Tiering, layer: int) -> Any:
        """MICRO (sum_w u_w' V u_w - u' V u / W): products of two experts that are fetched, by any two workers."""
        model, width = self.model, len(self.problem.workers)
        if width == 1 or not tiering.steep[layer]:
            return 0.0
        experts = [(e, w) for w in model.w for e, _ in self.modes]
        items = [item for w in model.w for item in self._items[layer, w]]
        active = np.maximum(tiering.active[layer], 1e-300)
        host = bool(tiering.host.any())
        outside = [
            (e, w, price / MICRO / float(active[e]), kind)
            for (e, w), item in zip(experts, items, strict=True)
            for price, kind in ([(item.disk, on_disk(model, item))] + [(item.host, model.hosted[item.key])] * host)
        ]
        total = 0.0
        for (e, v, unit, one), (f, w, other, two) in itertools.combinations_with_replacement(outside, 2):
            weight = float(tiering.covariance[layer, e, f]) * unit * other * ((v == w) - 1 / width) * MICRO
            if one is two:
                total += weight * one
            elif weight and (e != f or v != w):
                total += 2 * weight * both(model, one, two)
        return total

    def _arrivals(self) -> None:
        """arrive[l, w] >= its first tangents; every link's seconds <= link[l]."""
        model, problem = self.model, self.problem
        model.arrive = pyo.Var(model.layers, model.w, bounds=(0, None))
        for layer, w in itertools.product(model.layers, model.w):
            for slope in FIRST_TANGENTS:
                self.add_tangent(layer, w, slope)
        width = len(problem.workers)
        groups = links(problem)
        for layer, (ranks, price) in itertools.product(model.layers, groups):
            size = len(ranks) / width
            into = sum(model.arrive[layer, w] for w in ranks) * (1 - size)
            out = sum(model.arrive[layer, w] for w in model.w if w not in ranks) * size
            model.links.add(2 * MICRO * price * into <= model.link[layer])
            model.links.add(2 * MICRO * price * out <= model.link[layer])

    def add_tangent(self, layer: int, w: int, slope: float) -> None:
        """arrive >= 2 t S1 - t^2 (S1 + S2), in tokens of a step."""
        problem, model, width = self.problem, self.model, len(self.problem.workers)
        away = [(1 / r - 1 / width) / (1 - 1 / width) for _, r in self.modes]
        scale = float(problem.scale[layer])
        first = sum(
            scale * problem.loads[layer, e] * away[k] * model.u[layer, k, w] for k, (e, _) in enumerate(self.modes)
        )
        second = sum(
            scale
            * problem.pairs[layer, self.modes[k][0], self.modes[j][0]]
            * away[k]
            * away[j]
            * model.p[layer, k, j, w]
            for k, j in itertools.combinations(range(len(self.modes)), 2)
            if (layer, k, j, w) in model.p
        )
        model.tangents.add(model.arrive[layer, w] >= (2 * slope - slope**2) * first - slope**2 * second)

    def _follow_links(self) -> None:
        """The seconds of every port and uplink, each way, <= link[l], for the flow between l and l + 1."""
        model, problem = self.model, self.problem
        groups = links(problem)
        for layer, (ranks, price) in itertools.product(range(problem.num_layers - 1), groups):
            unit = float(MICRO * price * problem.scale[layer] / problem.top_k)
            stay = self._flow(layer, [(v, w) for v, w in self._near if v in ranks and w in ranks])
            rows, columns = problem.flows[layer].sum(axis=1), problem.flows[layer].sum(axis=0)
            out = sum(rows[e] / r * model.u[layer, k, w] for k, (e, r) in enumerate(self.modes) for w in ranks)
            into = sum(columns[e] / r * model.u[layer + 1, k, w] for k, (e, r) in enumerate(self.modes) for w in ranks)
            model.links.add(unit * (out - stay) <= model.link[layer])
            model.links.add(unit * (into - stay) <= model.link[layer])

    def _flow(self, layer: int, between: Iterable[tuple[int, int]]) -> Any:
        """Transitions between the given pairs of workers."""
        model, modes = self.model, self.modes
        return sum(
            self.problem.flows[layer, modes[k][0], modes[j][0]]
            / (modes[k][1] * modes[j][1])
            * model.s[layer, k, j, v, w]
            for v, w in between
            for k, j in itertools.product(range(len(modes)), repeat=2)
            if (layer, k, j, v, w) in model.s
        )

    def _total(self) -> Any:
        model, problem = self.model, self.problem
        total = sum(model.peak[layer] + model.link[layer] for layer in model.layers) + self._risk() + self._migration()
        if problem.tiering is not None:
            total += self._rent(problem.tiering)
        if problem.affinity > 0:
            same = [(w, w) for w in model.w]
            for layer in range(problem.num_layers - 1):
                unit = float(MICRO * affinity_price(problem) * problem.scale[layer] / problem.top_k)
                total += unit * (float(problem.flows[layer].sum()) - self._flow(layer, same))
        return total

    def _rent(self, tiering: Tiering) -> Any:
        """MICRO sum_w resident_s (sum inside + sum passing)."""
        total = 0.0
        for (layer, w), items in self._items.items():
            if tiering.resident_s[w] > 0:
                slots = sum(self.model.inside[item.key] for item in items) + self.model.passing[layer, w]
                total += float(MICRO * tiering.resident_s[w]) * slots
        return total

    def _risk(self) -> Any:
        problem, model = self.problem, self.model
        if problem.load_covariance is None or problem.caution == 0:
            return 0.0
        price = MICRO * risk_price(problem)[:, None] / problem.speed[None, :] ** 2
        own = sum(
            price[layer, w] * problem.load_covariance[layer, e, e] / r**2 * model.u[layer, k, w]
            for layer, w in itertools.product(model.layers, model.w)
            for k, (e, r) in enumerate(self.modes)
        )
        shared = sum(
            2.0
            * price[layer, w]
            * problem.load_covariance[layer, self.modes[k][0], self.modes[j][0]]
            / (self.modes[k][1] * self.modes[j][1])
            * model.p[layer, k, j, w]
            for layer, k, j, w in model.p
        )
        return own + shared

    def _migration(self) -> Any:
        before = held_before(self.problem)
        if before is None:
            return 0.0
        tiered = self.problem.tiering is not None
        if tiered and max(memory.cache_slots for memory in self.problem.memory) > 1:
            # not every expert that is found in the device is brought there beforehand; without them the bound holds
            return 0.0
        held = self.model.inside if tiered else self.model.u
        return (
            MICRO
            * move_price(self.problem)
            * sum(
                (1.0 - before[layer, e, w]) * held[layer, k, w]
                for layer, w in itertools.product(self.model.layers, self.model.w)
                for k, (e, _) in enumerate(self.modes)
            )
        )

    def table(self) -> IntArray:
        """[L, S] the table of the incumbent."""
        rows = []
        for layer in self.model.layers:
            held = [
                [e for k, (e, _) in enumerate(self.modes) if self.model.u[layer, k, w].value > 0.5]
                for w in self.model.w
            ]
            rows.append(row_of(self.problem, held))
        return np.stack(rows)

    def levels(self) -> LevelArray | None:
        """[L, E, W] the tiers of the incumbent; None where every expert fits."""
        if self.problem.tiering is None:
            return None
        found = np.full((*self.problem.loads.shape, len(self.problem.workers)), NOT_HELD, dtype=np.int8)
        for (layer, w), items in self._items.items():
            for item, (e, _) in zip(items, self.modes, strict=True):
                if item.served.value > 0.5:
                    inside, hosted = (v[item.key].value > 0.5 for v in (self.model.inside, self.model.hosted))
                    found[layer, e, w] = Tier.DEVICE if inside else Tier.HOST if hosted else Tier.DISK
        return found

    def start_from(self, table: IntArray, levels: LevelArray | None = None) -> None:
        """Offer a table, and tiers, as the incumbent, by setting the integer variables."""
        owner = self.problem.owner
        for layer in self.model.layers:
            replicas = np.bincount(table[layer][table[layer] >= 0], minlength=self.problem.num_experts)
            for k, (e, r) in enumerate(self.modes):
                chosen = int(replicas[e]) == r
                self.model.v[layer, k].value = float(chosen)
                for w in self.model.w:
                    here = chosen and bool((table[layer][owner == w] == e).any())
                    self.model.u[layer, k, w].value = float(here)
        if levels is not None:
            for (layer, w), items in self._items.items():
                chosen_levels = [
                    int(levels[layer, e, w]) if item.served.value else NOT_HELD
                    for item, (e, _) in zip(items, self.modes, strict=True)
                ]
                start_tiers(self.model, items, chosen_levels)
