"""Prices the change of every swap of two slots of one layer, all at once.

Legend: S slots (items), E experts, W workers.

The true cost counts the busiest worker and link only, so almost every swap leaves it as it is, and a search on it is
lost on a plateau. The search therefore descends a potential: a maximum over z becomes |z|_p / p * sum (z / |z|_p)^p,
with |z|_p frozen at the present state. Its gradient is that of the p-norm, it is a sum over workers, and so a swap
changes two terms only. Links between layers, uplinks, affinity and migration enter as prices per (item, worker),
linear while the other layers stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elastic_moe.cluster.placement import EMPTY
from elastic_moe.optimizer.core.problem import FloatArray, IntArray
from elastic_moe.optimizer.search.fetches import LayerFetch

BARRED = np.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTerms:
    """The statistics of one layer in seconds; everything outside of the layer is frozen."""

    load_s: FloatArray
    """[E] seconds of each expert's tokens on a worker of speed 1, on average over the scenarios."""
    scenario_s: FloatArray
    """[C, E] the same in each scenario, times the scenario's weight in the price at present."""
    tokens: FloatArray
    """[E] tokens of each expert in a step."""
    pairs: FloatArray
    """[E, E] tokens of a step that chose both; only read where arrivals are priced."""
    arrival_s: FloatArray
    """[W] seconds that one arriving token takes on each worker's port; all 0 under `follow`."""
    uplink_s: FloatArray
    """[W] seconds that one arriving token takes on its node's uplink; all 0 with one node."""
    covariance_s: FloatArray | None
    """[E, E] seconds for the covariance of two experts on one worker of speed 1; None: not priced."""
    place_s: FloatArray
    """[E, W] seconds for expert e on worker w: transitions to the neighbouring layers, and migration."""
    owner: IntArray
    """[S]"""
    first_slot: IntArray
    """[W]"""
    speed: FloatArray
    """[W]"""
    node: IntArray
    """[W]"""
    fetch: LayerFetch | None
    """What the workers fetch; None where every expert fits."""
    load_power: int
    """The norm's exponent as a number of squarings: 6 is the 64-norm."""
    link_power: int

    traffic: bool
    """Whether arriving tokens have a price on some worker's port."""

    @property
    def weights(self) -> FloatArray:
        """[C] weight of each scenario in the price at present."""
        total = self.scenario_s.sum(axis=1)
        return np.asarray(total / max(float(total.sum()), 1e-300))

    def shares(self, row: IntArray) -> FloatArray:
        """[S] share of its expert's tokens that each slot serves, over all homes; 0 for EMPTY."""
        item = row - EMPTY  # 0 stands for EMPTY
        of_item = 1.0 / np.maximum(np.bincount(item, minlength=len(self.load_s) + 1), 1)
        of_item[0] = 0.0
        return np.asarray(of_item[item])

    def remote_shares(self, share: FloatArray) -> FloatArray:
        """[S] share of its expert's tokens from other homes that each slot serves; 0 for EMPTY."""
        alone = 1 / len(self.speed)
        return np.where(share > 0, (share - alone) / (1 - alone), 0.0)

    def arrivals(self, row: IntArray, share: FloatArray) -> FloatArray:
        """[W] tokens of a step that arrive at each worker if the slots hold `row` [S]."""
        away = self.by_worker(row, self.remote_shares(share))
        first = self.tokens @ away
        second = 0.5 * ((self.pairs @ away) * away).sum(axis=0)
        return np.asarray(first**2 / np.maximum(first + second, 1e-300))

    def by_worker(self, row: IntArray, share: FloatArray) -> FloatArray:
        """[E, W] the shares [S] of each expert that each worker has."""
        x = np.zeros((len(self.load_s) + 1, len(self.speed)))  # the last row stands for EMPTY
        x[row, self.owner] = share
        return x[:-1]

    def objective(self, row: IntArray) -> float:
        """Seconds of the layer, with norms in place of maxima. Every swap that swap_deltas recommends lowers it."""
        share = self.shares(row)
        total = sum(potential_norm(each, self.load_power) for each in self._busy(row, share))
        total += float((self.place_s[row, self.owner] * share).sum())
        if self.traffic:
            arrive = self.arrivals(row, share)
            uplink = np.bincount(self.node, arrive * self.uplink_s)
            total += potential_norm(np.concatenate([arrive * self.arrival_s, uplink]), self.link_power)
        if self.covariance_s is not None:
            x = self.by_worker(row, share)
            total += float((((self.covariance_s @ x) * x).sum(axis=0) / self.speed**2).sum())
        return total

    def _busy(self, row: IntArray, share: FloatArray) -> list[FloatArray]:
        """C times [W] seconds in which each worker computes, and [W] in which each makes the layer wait."""
        computes = [np.add.reduceat(load_s[row] * share, self.first_slot) / self.speed for load_s in self.scenario_s]
        if self.fetch is None:
            return computes
        waits = self.fetch.waits(self.by_worker(row, share))
        return [np.append(each, weight * waits) for each, weight in zip(computes, self.weights, strict=True)]


def swap_deltas(terms: LayerTerms, row: IntArray) -> FloatArray:
    """[S, S] change of the potential if slots i and j trade their contents; BARRED where they must not. Symmetric."""
    owner, share = terms.owner, terms.shares(row)
    half = _busy_half(terms, row, share)
    if terms.traffic:
        half += _arrival_half(terms, row, terms.remote_shares(share))
    if terms.covariance_s is not None:
        half += _risk_half(terms, terms.covariance_s, row, share)
    place = terms.place_s[row] * share[:, None]
    half += place[:, owner] - place[np.arange(len(row)), owner][:, None]
    deltas = half + half.T
    deltas[owner[:, None] == owner[None, :]] = BARRED
    if ((share > 0) & (share < 1)).any():
        deltas[_doubles(terms, row, share > 0)] = BARRED
    return np.asarray(deltas)


def _busy_half(terms: LayerTerms, row: IntArray, share: FloatArray) -> FloatArray:
    """[S, S] change of the time in which worker owner[i] computes and waits if it gives item i for item j."""
    loads = terms.scenario_s[:, row] * share
    if terms.fetch is None:
        return sum((_load_half(terms, load) for load in loads[1:]), start=_load_half(terms, loads[0]))
    return _fetching_half(terms, terms.fetch, row, share, loads)


def _fetching_half(
    terms: LayerTerms, fetch: LayerFetch, row: IntArray, share: FloatArray, loads: FloatArray
) -> FloatArray:
    """[S, S] `_busy_half` for items' loads [C, S] in each scenario, where workers wait for experts too."""
    owner = terms.owner
    x = terms.by_worker(row, share)
    prices, waits = fetch.prices(x), fetch.waits(x)
    held = np.add.reduceat((row != EMPTY).astype(np.int32), terms.first_slot)
    # EMPTY has no tokens, since its share is 0
    fetched = fetch.swap_changes(fetch.chance[row] * share, held, owner, terms.first_slot)
    unit = prices / np.maximum(fetch.active, 1e-300)[:, None]
    spread = fetch.slope * fetched + fetch.steep * fetch.variance_changes(unit, row, owner)
    total = np.zeros((len(row), len(row)))
    for load, weight in zip(loads, terms.weights, strict=True):
        worker = np.add.reduceat(load, terms.first_slot) / terms.speed
        norm = potential_norm(np.append(worker, weight * waits), terms.load_power)
        change = raised(weight * np.maximum(waits[owner][:, None] + fetch.own * fetched, 0.0) / norm, terms.load_power)
        change -= raised(weight * waits / norm, terms.load_power)[owner][:, None]
        change *= norm / 2**terms.load_power
        steepness = float(((weight * waits / norm) ** (2**terms.load_power - 1)).sum())
        total += _load_half(terms, load, norm) + change + weight * steepness * spread
    return total


def _load_half(terms: LayerTerms, load: FloatArray, norm: float | None = None) -> FloatArray:
    """[S, S] change of worker owner[i]'s compute term if it gives item i for item j; `norm` where more than the
    computing is in it."""
    worker = np.add.reduceat(load, terms.first_slot) / terms.speed
    norm, now = _potential(worker, terms.load_power, norm)
    per_token = 1 / (norm * terms.speed[terms.owner])
    after = np.multiply.outer(per_token, load)
    after += ((worker / norm)[terms.owner] - per_token * load)[:, None]
    change = raised(after, terms.load_power)
    change *= norm / 2**terms.load_power
    change -= now[terms.owner][:, None]
    return change


def _arrival_half(terms: LayerTerms, row: IntArray, share: FloatArray) -> FloatArray:
    """[S, S] change of the traffic terms of worker owner[i] (its port, its part of the uplink) if it gives i for j."""
    owner = terms.owner
    tokens = terms.tokens[row] * share
    pairs, with_worker, own = _together(terms, terms.pairs, row, share)
    first = np.add.reduceat(tokens, terms.first_slot)
    second = 0.5 * np.add.reduceat(own, terms.first_slot)
    arrive = first**2 / np.maximum(first + second, 1e-300)
    port = arrive * terms.arrival_s
    uplink = np.asarray(np.bincount(terms.node, arrive * terms.uplink_s), dtype=np.float64)
    power = terms.link_power
    norm = potential_norm(np.concatenate([port, uplink]), power)

    first_after = (first[owner] - tokens)[:, None] + tokens
    both_after = _after(second[owner] - own, with_worker, pairs, owner)
    both_after += first_after
    after = np.square(first_after, out=first_after)
    after /= np.maximum(both_after, 1e-300, out=both_after)
    change = raised(after * (terms.arrival_s[owner][:, None] / norm), power)
    change -= raised(port / norm, power)[owner][:, None]
    if len(uplink) > 1:
        change += _uplink_half(terms, (after - arrive[owner][:, None]) * terms.uplink_s[owner][:, None], uplink, norm)
    return np.asarray(change * (norm / 2**power))


def _uplink_half(terms: LayerTerms, change: FloatArray, uplink: FloatArray, norm: float) -> FloatArray:
    """[S, S] change of the uplink term of item i's node. Inside one node each of the two workers answers for half."""
    node = terms.node[terms.owner]
    inside = node[:, None] == node[None, :]
    change = np.where(inside, change + change.T, change)
    now = uplink[node][:, None]
    after = raised((now + change) / norm, terms.link_power) - raised(now / norm, terms.link_power)
    return np.where(inside, 0.5 * after, after)


def _risk_half(terms: LayerTerms, covariance_s: FloatArray, row: IntArray, share: FloatArray) -> FloatArray:
    """[S, S] change of worker owner[i]'s variance term if it gives item i for item j."""
    owner = terms.owner
    covariance, with_worker, own = _together(terms, covariance_s, row, share)
    alone = np.diagonal(covariance)
    change = _after((alone - 2 * own) / 2, with_worker, covariance, owner)
    change *= 2
    change += alone
    change /= (terms.speed**2)[owner][:, None]
    return change


def _together(
    terms: LayerTerms, of_two: FloatArray, row: IntArray, share: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """([S, S] a statistic [E, E] of every two items; [S, W] of every item with all of a worker; [S] with its own)."""
    pairs = of_two[row[:, None], row] * (share[:, None] * share)
    with_worker = (of_two @ terms.by_worker(row, share))[row] * share[:, None]
    return pairs, with_worker, with_worker[np.arange(len(row)), terms.owner]


def _after(before: FloatArray, with_worker: FloatArray, pairs: FloatArray, owner: IntArray) -> FloatArray:
    """[S, S] before [S] plus what item j has with owner[i]'s items, item i left out."""
    change = np.ascontiguousarray(with_worker.T)[owner]
    change -= pairs
    change += before[:, None]
    return change


def _doubles(terms: LayerTerms, row: IntArray, held: np.ndarray) -> np.ndarray:
    """[S, S] whether a swap would put two replicas of one expert on one worker."""
    on = np.zeros((len(terms.load_s) + 1, len(terms.first_slot)), dtype=bool)  # the last row stands for EMPTY
    on[row[held], terms.owner[held]] = True
    meets = on[row][:, terms.owner]
    return np.asarray(meets | meets.T)


def _potential(z: FloatArray, power: int, norm: float | None = None) -> tuple[float, FloatArray]:
    norm = potential_norm(z, power) if norm is None else norm
    return norm, np.asarray(raised(z / norm, power) * (norm / 2**power))


def potential_norm(z: FloatArray, power: int) -> float:
    """The 2 ** power norm of z [...], which stands for its maximum."""
    peak = max(float(z.max()), 1e-300)
    # the sum is below 1 only where all links are unused, because every worker holds every expert
    return float(peak * max(raised(z / peak, power).sum(), 1.0) ** (0.5**power))


def raised(z: FloatArray, power: int) -> FloatArray:
    """z to the power of 2 ** power, by squaring; what would leave the range of floats is far worse than any gain
    anyway."""
    z = np.minimum(z, 10.0 ** (250 / 2**power))
    for _ in range(power):
        np.multiply(z, z, out=z)
    return z


def best_swaps(deltas: FloatArray, first_slot: IntArray, least: float) -> list[tuple[int, int]]:
    """The best swaps that gain more than `least`. No worker is in two of them, so their changes add up and all can be
    done at once."""
    by_worker = np.minimum.reduceat(np.minimum.reduceat(deltas, first_slot, axis=0), first_slot, axis=1)
    if by_worker.min() >= -least:
        return []
    ends = np.append(first_slot[1:], len(deltas))
    first, second = np.nonzero(np.triu(by_worker < -least, 1))
    taken: set[int] = set()
    swaps = []
    for k in np.argsort(by_worker[first, second]):
        a, b = int(first[k]), int(second[k])
        if a in taken or b in taken:
            continue
        taken |= {a, b}
        block = deltas[first_slot[a] : ends[a], first_slot[b] : ends[b]]
        i, j = divmod(int(block.argmin()), block.shape[1])
        swaps.append((int(first_slot[a]) + i, int(first_slot[b]) + j))
    return swaps
