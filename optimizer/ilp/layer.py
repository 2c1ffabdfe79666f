"""The mixed-integer program for one layer and a few of its workers, by which the planner `ilp` improves large problems.

It deals the contents of the chosen workers among them again; everything else stays.

Sets        experts e that the chosen workers hold, workers w
Variables   x[e, w] in {0, 1}: w holds e; p[e, f, w] in [0, 1]: it holds both; peak, link >= 0; arrive[w] >= 0
Objective   peak + link + risk + prices of (e, w) between layers and of moves, as optimizer.core.cost has them
"""

from __future__ import annotations

import itertools

import numpy as np
import pyomo.environ as pyo

from elastic_moe.cluster.placement import EMPTY
from elastic_moe.optimizer.core.problem import FloatArray, IntArray
from elastic_moe.optimizer.ilp.joint import MICRO
from elastic_moe.optimizer.ilp.tiers import Served, add_tiers, fetched, fit
from elastic_moe.optimizer.residency.activity import activity
from elastic_moe.optimizer.search.fetches import LayerFetch
from elastic_moe.optimizer.search.swaps import LayerTerms

TANGENTS = (0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 1.0)


class LayerModel:
    """The Pyomo model for `ranks` of a layer whose slots are `row` [S]. Times are in microseconds."""

    def __init__(self, terms: LayerTerms, row: IntArray, ranks: list[int]) -> None:
        self.terms, self.row, self.ranks = terms, row, ranks
        inside = np.isin(terms.owner, ranks) & (row != EMPTY)
        self.experts, self._copies = np.unique(row[inside], return_counts=True)
        replicas = np.bincount(row[row != EMPTY], minlength=len(terms.load_s))[self.experts]
        self._share = 1.0 / replicas
        self.model = pyo.ConcreteModel()
        model = self.model
        model.e = pyo.RangeSet(0, len(self.experts) - 1)
        model.w = pyo.Set(initialize=ranks)
        model.x = pyo.Var(model.e, model.w, domain=pyo.Binary)
        model.peak = pyo.Var(bounds=(MICRO * self._peak_elsewhere(), None))
        model.link = pyo.Var(bounds=(0, None))
        self._respect_slots()
        self._bound_by_peak()
        if terms.fetch is not None:
            self._wait_for_experts(terms.fetch)
        self._products()
        if terms.arrival_s.any():
            self._arrivals(row)
        model.objective = pyo.Objective(expr=model.peak + model.link + MICRO * (self._places() + self._risk()))
        self._start()

    def _loads(self) -> FloatArray:
        """[W] seconds of every worker in the present table."""
        held = self.row != EMPTY
        replicas = np.maximum(np.bincount(self.row[held], minlength=len(self.terms.load_s)), 1)
        load = np.where(held, self.terms.load_s[self.row] / replicas[self.row], 0.0)
        return np.asarray(np.bincount(self.terms.owner, load, len(self.terms.speed)) / self.terms.speed)

    def _peak_elsewhere(self) -> float:
        others = np.delete(self._loads(), self.ranks)
        return float(others.max(initial=0.0))

    def _respect_slots(self) -> None:
        """Every expert keeps its number of copies; sum_e x[e, w] <= slots_w."""
        slots = np.bincount(self.terms.owner)
        model = self.model
        model.copies = pyo.Constraint(model.e, rule=lambda m, e: sum(m.x[e, w] for w in m.w) == int(self._copies[e]))
        model.slots = pyo.Constraint(model.w, rule=lambda m, w: sum(m.x[e, w] for e in m.e) <= int(slots[w]))

    def _bound_by_peak(self) -> None:
        """sum_e load_e share_e x[e, w] / speed_w <= peak."""
        seconds = self.terms.load_s[self.experts] * self._share
        self.model.slowest = pyo.Constraint(
            self.model.w,
            rule=lambda m, w: sum(float(MICRO * seconds[e] / self.terms.speed[w]) * m.x[e, w] for e in m.e) <= m.peak,
        )

    def _wait_for_experts(self, fetch: LayerFetch) -> None:
        """F_w + slope sum_v F_v + (what variance adds now) <= peak, with the other workers as they are; the rooms."""
        model, share = self.model, self._share[:, None]
        load = fetch.chance[self.experts][:, None] * share
        active = activity(load, fetch.tokens)
        disk = MICRO * active * fetch.disk_s
        host = MICRO * np.minimum(active * fetch.host_s, load * fetch.tokens * fetch.token_s)
        self._items = {
            w: [
                Served(key=(e, w), served=model.x[e, w], passing=(w,), disk=float(disk[e, w]), host=float(host[e, w]))
                for e in model.e
            ]
            for w in self.ranks
        }
        add_tiers(model, [item for items in self._items.values() for item in items], [(w,) for w in self.ranks])
        for w in self.ranks:
            fit(model, self._items[w], [(w,)], int(fetch.room[w]), int(fetch.host_room[w]))
        x = self.terms.by_worker(self.row, self.terms.shares(self.row))
        now = fetch.prices(x).sum(axis=0)
        varies = MICRO * float((fetch.waits(x) - fetch.own * now)[0] - fetch.slope * now.sum())
        others = MICRO * np.delete(now, self.ranks)
        seconds = [fetched(model, self._items[w]) for w in self.ranks]
        spread = fetch.slope * (sum(seconds) + float(others.sum())) + varies
        for each in [*seconds, *([float(others.max())] if len(others) else [])]:
            model.tiers.add(fetch.own * each + spread <= model.peak)

    def _products(self) -> None:
        """p <= x, p <= x', and p >= x + x' - 1 where sharing a worker costs."""
        model = self.model
        pairs = list(itertools.combinations(range(len(self.experts)), 2))
        model.p = pyo.Var(pairs, model.w, bounds=(0, 1))
        model.product = pyo.ConstraintList()
        for (e, f), w in itertools.product(pairs, self.ranks):
            model.product.add(model.p[e, f, w] <= model.x[e, w])
            model.product.add(model.p[e, f, w] <= model.x[f, w])
            if self.terms.covariance_s is not None:
                model.product.add(model.p[e, f, w] >= model.x[e, w] + model.x[f, w] - 1)

    def _arrivals(self, row: IntArray) -> None:
        """arrive[w] >= tangents of S1^2 / (S1 + S2); arrival_s_w arrive[w] <= link, and each node's sum, with the
        rest as it is."""
        terms, model = self.terms, self.model
        model.arrive = pyo.Var(model.w, bounds=(0, None))
        model.tangents = pyo.ConstraintList()
        model.links = pyo.ConstraintList()
        width = len(terms.speed)
        away = (self._share - 1 / width) / (1 - 1 / width)
        tokens = terms.tokens[self.experts] * away
        pairs = terms.pairs[np.ix_(self.experts, self.experts)] * (away[:, None] * away[None, :])
        for w in self.ranks:
            first = sum(float(tokens[e]) * model.x[e, w] for e in model.e)
            second = sum(float(pairs[e, f]) * model.p[e, f, w] for e, f in itertools.combinations(model.e, 2))
            for slope in TANGENTS:
                model.tangents.add(model.arrive[w] >= (2 * slope - slope**2) * first - slope**2 * second)
            model.links.add(float(MICRO * terms.arrival_s[w]) * model.arrive[w] <= model.link)
        now = terms.arrivals(row, terms.shares(row))
        others = np.delete(now * terms.arrival_s, self.ranks)
        model.links.add(model.link >= MICRO * float(others.max(initial=0.0)))
        for node in np.unique(terms.node) if terms.uplink_s.any() else ():
            on = np.flatnonzero(terms.node == node)
            stays = sum(float(MICRO * now[w] * terms.uplink_s[w]) for w in on if w not in self.ranks)
            model.links.add(
                stays + sum(float(MICRO * terms.uplink_s[w]) * model.arrive[w] for w in on if w in self.ranks)
                <= model.link
            )

    def _places(self) -> pyo.Expression:
        place = self.terms.place_s[self.experts] * self._share[:, None]
        return sum(float(place[e, w]) * self.model.x[e, w] for e in self.model.e for w in self.model.w)

    def _risk(self) -> pyo.Expression:
        """sum_w x' V x / speed_w^2, diagonal and products."""
        if self.terms.covariance_s is None:
            return 0.0
        cover = self.terms.covariance_s[np.ix_(self.experts, self.experts)] * (self._share[:, None] * self._share)
        model, total = self.model, 0.0
        for w in self.ranks:
            unit = 1.0 / float(self.terms.speed[w]) ** 2
            total += sum(unit * float(cover[e, e]) * model.x[e, w] for e in model.e)
            for e, f in itertools.combinations(model.e, 2):
                total += 2 * unit * float(cover[e, f]) * model.p[e, f, w]
        return total

    def _start(self) -> None:
        for w in self.ranks:
            held = set(self.row[self.terms.owner == w].tolist())
            for e in self.model.e:
                self.model.x[e, w].value = float(int(self.experts[e]) in held)

    def chosen_row(self) -> IntArray:
        """[S] the slots of the incumbent."""
        row = self.row.copy()
        for w in self.ranks:
            slots = np.flatnonzero(self.terms.owner == w)
            held = [int(self.experts[e]) for e in self.model.e if self.model.x[e, w].value > 0.5]
            row[slots] = held + [EMPTY] * (len(slots) - len(held))
        return row
