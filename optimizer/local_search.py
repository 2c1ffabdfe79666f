"""Joint local search over all layers: the planner `local_search`, and the seed of the ILP.

Source: ours; iterated local search after Lourenco, Martin and Stuetzle 2003. Anytime. First sweeps over the layers,
each descended by its best swaps while its neighbours stay, with the norm that stands for the maximum sharpened step
by step; then layers are shaken and descended again until the deadline. The best table under the true cost is kept
throughout."""

from __future__ import annotations

import time

import numpy as np

from cluster.placement import EMPTY
from optimizer.chaining import lined_up
from optimizer.draft import Budget, Draft
from optimizer.heuristics import greedy_table, random_table
from optimizer.layer_prices import LayerPricer
from optimizer.problem import IntArray, PlacementProblem
from optimizer.redeals import best_redeals
from optimizer.result import Termination
from optimizer.swaps import LayerTerms, best_swaps, swap_deltas

SHARPNESS = ((0, 1), (0, 1), (1, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3), (7, 4))
"""(load, link) exponents, as numbers of squarings, of each round of sweeps: from a soft mean to nearly the maximum."""

EAGERNESS = (8.0, 4.0, 4.0, 3.0, 3.0, 2.0, 1.5, 1.0, 1.0, 1.0)
"""Factor on the small prices between layers in each round: layers line up while balance is still soft."""

LEAST_GAIN = 1e-6
"""Share of a layer's cost below which a swap is not worth an evaluation."""

MOST_EVALUATIONS = 400
"""Per descent of one layer."""

REDEALS = 6
"""Moves of a replica that are evaluated in full before a descent is at its end."""

LARGE = 10**6
"""Swaps to look at over all layers, above which each layer is finished in turn: joint rounds would not end."""

LARGE_ROUNDS = ((2, 1), (4, 2), (6, 3), (7, 4))
"""SHARPNESS for large problems."""


SHAKEN = ((6, 3), (9, 5))
"""Rounds of SHARPNESS for one layer after it was disturbed: in the sharpest most of the balance is won."""

PAIRED = 0.25
"""Share of disturbances that take a layer and the next together."""

SMALL_ROW = 16
"""Slots of a layer up to which a random layer, descended, often comes out as good as any."""

ANEW = 0.1
"""Share of disturbances that deal such a layer anew."""

KICKS_PER_LAYER = 20
"""Disturbances of each layer after which the planner `local_search` stops of itself."""

LEAST_KICKS = 200
"""The same for problems of few layers, where each takes next to no time."""

FROM_CURRENT = 5
"""Round of SHARPNESS from which a placement in force is improved: softer rounds would move what need not move."""


def local_search_plan(problem: PlacementProblem, budget: Budget) -> Draft:
    """The best placement found until the deadline: from greedy lined up, and from the current placement if any."""
    search = JointSearch(problem, lined_up(problem, greedy_table(problem, budget.rng)))
    if problem.current is not None and problem.current.workers == problem.workers:
        search.sweep(budget.share(0.4).ends)
        stay = JointSearch(problem, problem.current.physical_to_logical_map)
        stay.sweep(budget.share(0.4).ends, FROM_CURRENT)
        if stay.total_s < search.total_s:
            search = stay
    else:
        search.sweep(budget.ends)
    kicks = max(KICKS_PER_LAYER * problem.num_layers, LEAST_KICKS)
    tried, kept = search.shake(budget, kicks)
    return Draft(
        table=search.table,
        reason=f"swaps over all layers jointly; {kept} of {tried} shaken layers came out better",
        termination=Termination.COMPLETED if tried == kicks else Termination.DEADLINE,
    )


class JointSearch:
    """A table [L, S] under improvement."""

    def __init__(self, problem: PlacementProblem, table: IntArray) -> None:
        self.problem = problem
        self.table = table.copy()
        self.pricer = LayerPricer(problem, self.table)
        self._replicated = problem.num_slots > problem.num_experts

    @property
    def total_s(self) -> float:
        """The true cost of the table."""
        return self.pricer.total_s(self.table)

    def sweep(self, ends: float, first_round: int = 0) -> None:
        """Descend every layer, back and forth, ever sharper, until `ends` at most. Keeps the best table."""
        if self.problem.num_layers * self.problem.num_slots**2 > LARGE:
            self._finish_layers(ends)
            return
        best, best_s = self.table.copy(), self.pricer.total_s(self.table)
        layers = range(self.problem.num_layers)
        rounds = list(zip(SHARPNESS, EAGERNESS, strict=True))[first_round:]
        for k, ((load_power, link_power), eager) in enumerate(rounds):
            # a soft round that takes too long would leave no time for the sharp ones, which balance
            round_ends = time.monotonic() + (ends - time.monotonic()) / (len(rounds) - k)
            for layer in [*layers, *reversed(layers)]:
                self.descend(layer, load_power, link_power, round_ends, eager)
                if time.monotonic() > round_ends:
                    break
            now_s = self.pricer.total_s(self.table)
            if now_s < best_s:
                best, best_s = self.table.copy(), now_s
        self.restore(best)

    def _finish_layers(self, ends: float) -> None:
        """Bring one layer after another through all rounds, each with its share of the time left."""
        for layer in range(self.problem.num_layers):
            begun = time.monotonic()
            layer_ends = begun + (ends - begun) / (self.problem.num_layers - layer)
            was, was_s = self.table[layer].copy(), self.pricer.around_s(layer)
            for k, (load_power, link_power) in enumerate(LARGE_ROUNDS):
                now = time.monotonic()
                self.descend(layer, load_power, link_power, now + (layer_ends - now) / (len(LARGE_ROUNDS) - k))
            if self.pricer.around_s(layer) >= was_s:
                self.table[layer] = was
                self.pricer.update(self.table, layer)

    def shake(self, budget: Budget, most: int) -> tuple[int, int]:
        """Disturb one layer after another and descend again; keep what is better. (tried, kept), tried <= `most`."""
        rng, tried, kept = budget.rng, 0, 0
        layers = self.problem.num_layers
        order = rng.permutation(layers)
        while tried < most and time.monotonic() < budget.ends:
            layer = int(order[tried % layers])
            # what a layer gains by lining up with its neighbour may need both to move
            shaken = [layer, layer + 1] if layer + 1 < layers and rng.random() < PAIRED else [layer]
            tried += 1
            was, was_s = self.table[shaken].copy(), self.pricer.around_s(*shaken)
            for each in shaken:
                self._disturb(each, rng)
            for load_power, link_power in SHAKEN:
                for each in shaken:
                    self.descend(each, load_power, link_power, budget.ends)
            if self.pricer.around_s(*shaken) < was_s * (1 - 1e-9):
                kept += 1
            else:
                self.table[shaken] = was
                for each in shaken:
                    self.pricer.update(self.table, each)
        return tried, kept

    def _disturb(self, layer: int, rng: np.random.Generator) -> None:
        """Give a spare slot to another expert, or trade the contents of a few random slots, where that is allowed; now
        and then deal a small layer anew."""
        row, problem = self.table[layer], self.problem
        if len(row) <= SMALL_ROW and rng.random() < ANEW:
            row[:] = random_table(problem, rng)[layer]
            for _ in range(len(row) - problem.num_experts):
                self._redeal_spare(layer, rng)
        elif len(row) > problem.num_experts and rng.random() < 0.5:
            self._redeal_spare(layer, rng)
        else:
            for _ in range(int(rng.integers(2, max(3, len(row) // 8)))):
                i, j = (int(k) for k in rng.integers(len(row), size=2))
                here, there = problem.owner == problem.owner[i], problem.owner == problem.owner[j]
                if not here[j] and row[i] not in row[there] and row[j] not in row[here]:
                    row[i], row[j] = row[j], row[i]
        self.pricer.update(self.table, layer)

    def _redeal_spare(self, layer: int, rng: np.random.Generator) -> None:
        """Empty a slot that is EMPTY or one of several replicas, or fill it with an expert that its worker lacks."""
        row, problem = self.table[layer], self.problem
        replicas = np.bincount(row[row != EMPTY], minlength=problem.num_experts)
        spare = np.flatnonzero((row == EMPTY) | (replicas[row] > 1))
        if not len(spare):
            return
        slot = int(rng.choice(spare))
        lacking = np.setdiff1d(np.arange(problem.num_experts), row[problem.owner == problem.owner[slot]])
        heat = problem.loads[layer, lacking] / replicas[lacking]
        if len(lacking) and heat.sum() > 0 and rng.random() < 0.9:
            row[slot] = rng.choice(lacking, p=heat / heat.sum())
        else:
            row[slot] = EMPTY

    def descend(self, layer: int, load_power: int, link_power: int, ends: float, eagerness: float = 1.0) -> int:
        """Do the best swaps of one layer until none gains, then give spare slots to other experts where that gains, and
        so on; its neighbours stay. Returns how many were done."""
        terms = self.pricer.terms(layer, load_power, link_power, eagerness)
        row, done = self.table[layer], 0
        value = terms.objective(row)
        for _ in range(MOST_EVALUATIONS):
            swaps = best_swaps(swap_deltas(terms, row), terms.first_slot, LEAST_GAIN * self.pricer.typical_s)
            kept, value = _do_swaps(terms, row, swaps, value)
            if not kept and self._replicated:
                kept, value = _redeal(terms, row, value)
            done += kept
            if not kept or time.monotonic() > ends:
                break
        if done:
            self.pricer.update(self.table, layer)
        return done

    def restore(self, table: IntArray) -> None:
        self.table[:] = table
        for layer in range(self.problem.num_layers):
            self.pricer.update(self.table, layer)


def _do_swaps(terms: LayerTerms, row: IntArray, swaps: list[tuple[int, int]], value: float) -> tuple[int, float]:
    """Do them at once if that gains, else the better half of them, and so on: (how many were done, the objective then).

    Swaps of different workers still meet on an uplink.
    """
    while swaps:
        for i, j in swaps:
            row[i], row[j] = row[j], row[i]
        after = terms.objective(row)
        if after < value:
            return len(swaps), after
        for i, j in reversed(swaps):
            row[i], row[j] = row[j], row[i]
        swaps = swaps[: len(swaps) // 2]
    return 0, value


def _redeal(terms: LayerTerms, row: IntArray, value: float) -> tuple[int, float]:
    """Give one spare slot to another expert if that gains: (1 or 0, the objective then)."""
    for slot, expert in best_redeals(terms, row, REDEALS):
        was, row[slot] = row[slot], expert
        after = terms.objective(row)
        if after < value * (1 - 1e-9):
            return 1, after
        row[slot] = was
    return 0, value
