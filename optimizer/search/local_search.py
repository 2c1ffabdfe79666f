"""Joint local search over all layers: the planner `local_search`, and the seed of the ILP.

Source: ours; iterated local search after Lourenco, Martin and Stuetzle 2003. It has three parts. First each layer is
descended in turn, and kept where the true cost fell. Then follow sweeps over all layers: each is descended by its best
swaps while its neighbours stay, and the norm that stands for the maximum is sharpened step by step. Then layers are
disturbed ("shaken") and descended again. The best table under the true cost is kept. It can be stopped at any time, and
the deadline only cuts these steps short, so with more time the answer is the same or better.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from elastic_moe.cluster.placement import EMPTY
from elastic_moe.optimizer.baselines.heuristics import greedy_table, random_table, unreplicated_table
from elastic_moe.optimizer.core.chaining import lined_up
from elastic_moe.optimizer.core.contract import Budget, Draft
from elastic_moe.optimizer.core.cost import price_table
from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem
from elastic_moe.optimizer.core.result import Termination
from elastic_moe.optimizer.search.layer_prices import LayerPricer
from elastic_moe.optimizer.search.redeals import best_redeals
from elastic_moe.optimizer.search.swaps import LayerTerms, best_swaps, swap_deltas

SHARPNESS = ((0, 1), (0, 1), (1, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3), (7, 4))
"""(load, link) exponents of each round of sweeps, as numbers of squarings: from a soft mean to nearly the maximum."""

EAGERNESS = (8.0, 4.0, 4.0, 3.0, 3.0, 2.0, 1.5, 1.0, 1.0, 1.0)
"""Factor of the small prices between layers in each round: layers line up while the balance is still soft."""

LEAST_GAIN = 1e-6
"""Least predicted gain of a swap, as a share of the layer's cost, for which the swap is evaluated."""

MOST_EVALUATIONS = 400
"""Most evaluations in one descent of a layer."""

REDEALS = 6
"""Number of moves of replicas that are evaluated in full at the end of a descent."""

LARGE = 10**6
"""Number of possible swaps over all layers above which layers are only finished in turn, until that gains nothing:
joint rounds would not end in time."""

FINISH = ((2, 1), (4, 2), (6, 3), (7, 4))
"""The rounds of SHARPNESS for one layer while its neighbours stay."""

QUICK = 10**4
"""Number of possible swaps over all layers up to which layers are finished at any deadline, which takes hundredths of a
second."""

Rounds = tuple[tuple[int, int], ...]

SHAKEN = ((6, 3), (9, 5))
"""The rounds of SHARPNESS for one layer after it was disturbed; the sharpest round gains most of the balance."""

PAIRED = 0.25
"""Share of disturbances that take a layer together with the next one."""

SMALL_ROW = 16
"""Number of slots of a layer up to which a random layer, after a descent, is often as good as any."""

ANEW = 0.1
"""Share of disturbances that deal such a layer again at random."""

KICKS_PER_LAYER = 20
"""Number of disturbances of each layer after which the planner `local_search` stops without a deadline."""

LEAST_KICKS = 200
"""Least number of disturbances, for problems of few layers, where each takes hardly any time."""

FROM_CURRENT = 5
"""Round of SHARPNESS from which a placement in force is improved: softer rounds would move experts without need."""


def local_search_plan(problem: PlacementProblem, budget: Budget) -> Draft:
    """The best placement found until the deadline, from greedy's lined-up table and from the current placement."""
    search = JointSearch(problem, lined_up(problem, _start(problem, budget.rng)))
    search.sweep(budget)
    if problem.current is not None and problem.current.workers == problem.workers:
        stay = JointSearch(problem, problem.current.physical_to_logical_map)
        stay.sweep(budget, FROM_CURRENT)
        if stay.total_s < search.total_s:
            search = stay
    kicks = max(KICKS_PER_LAYER * problem.num_layers, LEAST_KICKS)
    tried, kept = search.shake(budget, kicks)
    return Draft(
        table=search.table,
        reason=f"swaps over all layers jointly; {kept} of {tried} shaken layers came out better",
        termination=Termination.COMPLETED if tried == kicks else Termination.DEADLINE,
    )


def _start(problem: PlacementProblem, rng: np.random.Generator) -> IntArray:
    """Greedy's table; without its replicas where these take room that the experts need."""
    table = greedy_table(problem, rng)
    if problem.tiering is None:
        return table
    single = unreplicated_table(problem)
    return min((table, single), key=lambda each: price_table(problem, each).total_s)


class JointSearch:
    """A table [L, S] that is improved step by step."""

    def __init__(self, problem: PlacementProblem, table: IntArray) -> None:
        self.problem = problem
        self.table = table.copy()
        self.pricer = LayerPricer(problem, self.table)
        self._replicated = problem.num_slots > problem.num_experts

    @property
    def total_s(self) -> float:
        """The true cost of the table."""
        return self.pricer.total_s(self.table)

    def sweep(self, budget: Budget, first_round: int = 0) -> None:
        """Finish every layer in turn. Then begin again from the start, because finished layers no longer line up, and
        descend all layers back and forth with a sharper norm each time. Keeps the best table."""
        start = self.table.copy()
        swaps = self.problem.num_layers * self.problem.num_slots**2
        better = self._finish_layers(budget if swaps > QUICK else replace(budget, ends=math.inf), first_round)
        if swaps > LARGE:
            while better:
                better = self._finish_layers(budget, first_round)
            return
        best, best_s = self.table.copy(), self.total_s
        self.restore(start)
        layers = range(self.problem.num_layers)
        for (load_power, link_power), eager in list(zip(SHARPNESS, EAGERNESS, strict=True))[first_round:]:
            for layer in [*layers, *reversed(layers)]:
                self.descend(layer, load_power, link_power, budget, eager)
            if budget.left_s <= 0:
                break
            if (now_s := self.total_s) < best_s:
                best, best_s = self.table.copy(), now_s
            self.pricer.settle(self.table)
        self.restore(best)

    def _finish_layers(self, budget: Budget, first_round: int) -> bool:
        """Descend every layer to its end while the others stay. Returns whether any became better.

        The order is random: many short searches must not all begin with the same layers.
        """
        rounds = FINISH if first_round == 0 else FINISH[1:]
        order = budget.rng.permutation(self.problem.num_layers)
        return sum(self._try([int(layer)], rounds, budget) for layer in order) > 0

    def _try(self, layers: list[int], rounds: Rounds, budget: Budget, disturb: bool = False) -> bool:
        """Descend some layers, after a disturbance if wanted. Keep a better result that was ready in time; return
        whether there was one."""
        was, was_s = self.table[layers].copy(), self.pricer.around_s(*layers)
        for each in layers if disturb else ():
            self._disturb(each, budget.rng)
        for load_power, link_power in rounds:
            for each in layers:
                self.descend(each, load_power, link_power, budget)
        # a result that the deadline has cut short would differ with more time, and is not kept
        if self.pricer.around_s(*layers) < was_s * (1 - 1e-9) and budget.left_s > 0:
            return True
        self.table[layers] = was
        for each in layers:
            self.pricer.update(self.table, each)
        return False

    def shake(self, budget: Budget, most: int) -> tuple[int, int]:
        """Disturb and descend one layer after another; keep better results. Returns (tried, kept), with tried <=
        `most`."""
        rng, tried, kept = budget.rng, 0, 0
        layers = self.problem.num_layers
        order = rng.permutation(layers)
        while tried < most and budget.left_s > 0:
            layer = int(order[tried % layers])
            # a gain by lining up two layers may need a change of both
            shaken = [layer, layer + 1] if layer + 1 < layers and rng.random() < PAIRED else [layer]
            tried += 1
            kept += self._try(shaken, SHAKEN, budget, disturb=True)
        return tried, kept

    def _disturb(self, layer: int, rng: np.random.Generator) -> None:
        """Give a spare slot to another expert, or trade the contents of a few random slots, where that is allowed. Now
        and then, deal a small layer again at random."""
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

    def descend(self, layer: int, load_power: int, link_power: int, budget: Budget, eagerness: float = 1.0) -> int:
        """Do the best swaps of one layer until none gains, then give spare slots to other experts where that gains, and
        repeat; its neighbours stay. Returns the number of changes; 0 where no time is left."""
        if budget.left_s <= 0:
            return 0
        terms = self.pricer.terms(layer, load_power, link_power, eagerness)
        row, done = self.table[layer], 0
        value = terms.objective(row)
        for _ in range(MOST_EVALUATIONS):
            swaps = best_swaps(swap_deltas(terms, row), terms.first_slot, LEAST_GAIN * self.pricer.typical_s)
            kept, value = _do_swaps(terms, row, swaps, value)
            if not kept and self._replicated:
                kept, value = _redeal(terms, row, value)
            done += kept
            if not kept or budget.left_s <= 0:
                break
        if done:
            self.pricer.update(self.table, layer)
        return done

    def restore(self, table: IntArray) -> None:
        self.table[:] = table
        self.pricer.settle(self.table)
        for layer in range(self.problem.num_layers):
            self.pricer.update(self.table, layer)


def _do_swaps(terms: LayerTerms, row: IntArray, swaps: list[tuple[int, int]], value: float) -> tuple[int, float]:
    """Do all swaps if that gains, else the better half of them, and so on. Returns (number of swaps done, objective
    then).

    Swaps of different workers may still meet on one uplink.
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


def _emptied(terms: LayerTerms, row: IntArray) -> list[tuple[int, int]]:
    """(slot, EMPTY) of every replica, where experts do not all fit: a replica takes room that another may need."""
    if terms.fetch is None:
        return []
    replicas = np.bincount(row[row != EMPTY], minlength=len(terms.load_s))
    return [(int(slot), EMPTY) for slot in np.flatnonzero((row != EMPTY) & (replicas[row] > 1))]


def _redeal(terms: LayerTerms, row: IntArray, value: float) -> tuple[int, float]:
    """Give one spare slot to another expert, or empty it, if that gains. Returns (1 or 0, the objective then)."""
    for slot, expert in [*best_redeals(terms, row, REDEALS), *_emptied(terms, row)]:
        was, row[slot] = row[slot], expert
        after = terms.objective(row)
        if after < value * (1 - 1e-9):
            return 1, after
        row[slot] = was
    return 0, value
