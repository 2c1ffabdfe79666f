"""Joint local search over all layers: the planner `local_search`, and the seed of the ILP.

Source: ours; iterated local search after Lourenco, Martin and Stuetzle 2003. Anytime. First sweeps over the layers,
each descended by its best swaps while its neighbours stay, with the norm that stands for the maximum sharpened step
by step; then layers are shaken and descended again until the deadline. The best table under the true cost is kept
throughout."""

from __future__ import annotations

import time

import numpy as np

from optimizer.draft import Budget, Draft
from optimizer.heuristics import greedy_table
from optimizer.layer_prices import LayerPricer
from optimizer.problem import IntArray, PlacementProblem, Semantics
from optimizer.result import Termination
from optimizer.swaps import best_swaps, swap_deltas

SHARPNESS = ((0, 1), (0, 1), (1, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3), (7, 4))
"""(load, link) exponents, as numbers of squarings, of each round of sweeps: from a soft mean to nearly the maximum."""

EAGERNESS = (8.0, 4.0, 4.0, 3.0, 3.0, 2.0, 1.5, 1.0, 1.0, 1.0)
"""Factor on the small prices between layers of `home` in each round: layers line up while balance is still soft."""

LEAST_GAIN = 1e-6
"""Share of a layer's cost below which a swap is not worth an evaluation."""

MOST_EVALUATIONS = 400
"""Per descent of one layer. Prices that are linear at a kink can chase one another in a circle."""


def local_search_plan(problem: PlacementProblem, budget: Budget, start: IntArray | None = None) -> Draft:
    """The best placement found until the deadline, from `start` or else from greedy."""
    first = greedy_table(problem, budget.rng) if start is None else start
    search = JointSearch(problem, first)
    finished = search.sweep(budget.ends)
    kicks, kept = search.shake(budget) if finished else (0, 0)
    return Draft(
        table=search.table,
        reason=f"swaps over all layers jointly; {kept} of {kicks} shaken layers came out better",
        termination=Termination.COMPLETED if problem.num_experts == 1 else Termination.DEADLINE,
    )


class JointSearch:
    """A table [L, S] under improvement."""

    def __init__(self, problem: PlacementProblem, table: IntArray) -> None:
        self.problem = problem
        self.table = table.copy()
        self.pricer = LayerPricer(problem, self.table)

    def sweep(self, ends: float) -> bool:
        """Descend every layer, back and forth, ever sharper. Keeps the best table; False where time ran out."""
        best, best_s = self.table.copy(), self.pricer.total_s(self.table)
        layers = range(self.problem.num_layers)
        eagerness = EAGERNESS if self.problem.semantics is Semantics.HOME else (1.0,) * len(SHARPNESS)
        for (load_power, link_power), eager in zip(SHARPNESS, eagerness, strict=True):
            for layer in [*layers, *reversed(layers)]:
                self.descend(layer, load_power, link_power, ends, eager)
                if time.monotonic() > ends:
                    break
            now_s = self.pricer.total_s(self.table)
            if now_s < best_s:
                best, best_s = self.table.copy(), now_s
        self.restore(best)
        return time.monotonic() < ends

    def shake(self, budget: Budget) -> tuple[int, int]:
        """Disturb one layer after another and descend again, until the deadline; keep what is better. (tried, kept)"""
        rng, tried, kept = budget.rng, 0, 0
        layers = self.problem.num_layers
        order = rng.permutation(layers)
        while time.monotonic() < budget.ends:
            layer = int(order[tried % layers])
            tried += 1
            was, was_s = self.table[layer].copy(), self.pricer.around_s(self.table, layer)
            self._disturb(layer, rng)
            for load_power, link_power in SHARPNESS[5::2]:
                self.descend(layer, load_power, link_power, budget.ends)
            if self.pricer.around_s(self.table, layer) < was_s * (1 - 1e-9):
                kept += 1
            else:
                self.table[layer] = was
                self.pricer.update(self.table, layer)
        return tried, kept

    def _disturb(self, layer: int, rng: np.random.Generator) -> None:
        """Trade the contents of a few random slots, where that is allowed."""
        row, problem = self.table[layer], self.problem
        for _ in range(int(rng.integers(2, max(3, len(row) // 8)))):
            i, j = (int(k) for k in rng.integers(len(row), size=2))
            a, b = problem.owner[i], problem.owner[j]
            if a == b or row[i] == row[j]:
                continue
            if row[i] in row[problem.owner == b] or row[j] in row[problem.owner == a]:
                continue
            row[i], row[j] = row[j], row[i]
        self.pricer.update(self.table, layer)

    def descend(self, layer: int, load_power: int, link_power: int, ends: float, eagerness: float = 1.0) -> int:
        """Do the best swaps of one layer until none gains; its neighbours stay. Returns how many were done."""
        terms = self.pricer.terms(layer, load_power, link_power, eagerness)
        row, done = self.table[layer], 0
        for _ in range(MOST_EVALUATIONS):
            swaps = best_swaps(swap_deltas(terms, row), terms.first_slot, LEAST_GAIN * self.pricer.typical_s)
            for i, j in swaps:
                row[i], row[j] = row[j], row[i]
            done += len(swaps)
            if not swaps or time.monotonic() > ends:
                break
        if done:
            self.pricer.update(self.table, layer)
        return done

    def restore(self, table: IntArray) -> None:
        self.table[:] = table
        for layer in range(self.problem.num_layers):
            self.pricer.update(self.table, layer)
