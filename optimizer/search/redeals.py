"""Prices the change of giving a spare slot to another expert, for one layer: which replicas pay, and where.

Legend: E experts, W workers, P slots that are EMPTY or hold one of several replicas, F experts that might get a
replica.

Swaps keep the number of an expert's replicas; these moves do not. Moves are ranked by their change of load, of risk
and of prices between layers, which are frozen as in optimizer.search.swaps: so spare slots go to experts with much load
and to those whose load is least certain. The caller evaluates the few best moves in full.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.cluster.placement import EMPTY
from elastic_moe.optimizer.core.problem import FloatArray, IntArray
from elastic_moe.optimizer.search.swaps import LayerTerms, potential_norm, raised

CANDIDATES = 32
"""Number of experts, those with the most load and risk per replica, that may get a slot."""


def best_redeals(terms: LayerTerms, row: IntArray, most: int) -> list[tuple[int, int]]:
    """(slot, expert to put there) of the `most` moves that promise to gain, the best first."""
    replicas = np.bincount(row[row != EMPTY], minlength=len(terms.load_s))
    spare = np.flatnonzero((row == EMPTY) | (replicas[row] > 1)).astype(np.int32)
    if not len(spare):
        return []
    risk_s = 0.0 if terms.covariance_s is None else np.diagonal(terms.covariance_s)
    hot = np.argsort(-(terms.load_s + risk_s) / replicas, kind="stable")[:CANDIDATES].astype(np.int32)
    on = np.zeros((len(terms.load_s), len(terms.speed)), dtype=bool)
    on[row[row != EMPTY], terms.owner[row != EMPTY]] = True
    worker = terms.owner[spare]
    change = sum(
        (_busy_changes(terms, load_s, row, spare, hot, on) for load_s in terms.scenario_s),
        start=_taken_prices(terms, row, spare, on)[:, None] + _given_prices(terms, hot, on)[:, worker].T,
    )
    if terms.covariance_s is not None:
        change = change + _risk_changes(terms, terms.covariance_s, row, spare, hot, on)
    change[on[hot][:, worker].T] = np.inf
    best = np.argsort(change, axis=None, kind="stable")[:most]
    chosen = [divmod(int(k), len(hot)) for k in best]
    return [(int(spare[p]), int(hot[f])) for p, f in chosen if change[p, f] < 0]


def _busy_changes(
    terms: LayerTerms, load_s: FloatArray, row: IntArray, spare: IntArray, hot: IntArray, on: np.ndarray
) -> FloatArray:
    """[P, F] change of the norm of the workers' seconds, for experts' seconds [E] of one scenario."""
    replicas = np.bincount(row[row != EMPTY], minlength=len(load_s))
    taken, (given, here) = _taken(terms, load_s, row, spare, on), _given(terms, load_s, hot, on)
    busy = np.add.reduceat(np.where(row != EMPTY, (load_s / replicas)[row], 0.0), terms.first_slot) / terms.speed
    worker = terms.owner[spare]
    after = busy + taken[:, None, :] + given[None, :, :]
    after[np.arange(len(spare))[:, None], np.arange(len(hot))[None, :], worker[:, None]] += here[:, worker].T
    norm = potential_norm(busy, terms.load_power)
    change = (raised(np.maximum(after, 0.0) / norm, terms.load_power)).sum(axis=2)
    return np.asarray((change - raised(busy / norm, terms.load_power).sum()) * (norm / 2**terms.load_power))


def _taken(terms: LayerTerms, load_s: FloatArray, row: IntArray, spare: IntArray, on: np.ndarray) -> FloatArray:
    """[P, W] change of every worker's seconds if each spare slot loses what it holds."""
    expert, worker = row[spare], terms.owner[spare]
    held = expert != EMPTY
    count = np.maximum(on[expert].sum(axis=1), 2)
    load = load_s[expert]
    more = np.where(on[expert], (load * (1 / (count - 1) - 1 / count))[:, None], 0.0)
    more[np.arange(len(spare)), worker] = -load / count
    return np.where(held[:, None], more / terms.speed, 0.0)


def _taken_prices(terms: LayerTerms, row: IntArray, spare: IntArray, on: np.ndarray) -> FloatArray:
    """[P] change of the prices if each spare slot loses what it holds."""
    expert, worker = row[spare], terms.owner[spare]
    count, place = np.maximum(on[expert].sum(axis=1), 2), terms.place_s[expert]
    total = np.where(on[expert], place, 0.0).sum(axis=1)
    price = (total - place[np.arange(len(spare)), worker]) / (count - 1) - total / count
    return np.where(expert != EMPTY, price, 0.0)


def _given(terms: LayerTerms, load_s: FloatArray, hot: IntArray, on: np.ndarray) -> tuple[FloatArray, FloatArray]:
    """Where expert f gets one more replica: ([F, W] change of its holders' seconds, [F, W] seconds on the worker that
    gets the replica)."""
    count = on[hot].sum(axis=1)[:, None]
    load = load_s[hot][:, None]
    less = np.where(on[hot], load * (1 / (count + 1) - 1 / count), 0.0) / terms.speed
    return less, load / (count + 1) / terms.speed


def _given_prices(terms: LayerTerms, hot: IntArray, on: np.ndarray) -> FloatArray:
    """[F, W] change of the prices where expert f gets one more replica, by the worker that gets it."""
    count, place = on[hot].sum(axis=1)[:, None], terms.place_s[hot]
    total = np.where(on[hot], place, 0.0).sum(axis=1, keepdims=True)
    return np.asarray((total + place) / (count + 1) - total / count)


def _risk_changes(
    terms: LayerTerms, covariance_s: FloatArray, row: IntArray, spare: IntArray, hot: IntArray, on: np.ndarray
) -> FloatArray:
    """[P, F] change of the risk. With d the change of an expert's shares [W], it is the sum over workers of
    2 d C x + d C d, for the expert that goes, the one that comes, and both together."""
    expert, worker, slow = row[spare], terms.owner[spare], 1 / terms.speed**2
    held = (expert != EMPTY)[:, None]
    count = np.maximum(on[expert].sum(axis=1), 2)
    goes = np.where(on[expert] & held, (1 / (count - 1) - 1 / count)[:, None], 0.0)
    goes[np.arange(len(spare)), worker] = np.where(held[:, 0], -1 / count, 0.0)
    number = on[hot].sum(axis=1)[:, None]
    comes, here = np.where(on[hot], 1 / (number + 1) - 1 / number, 0.0), 1 / (number + 1)
    # [E, W] covariance of each expert with all that each worker serves
    varies = covariance_s @ (on / np.maximum(on.sum(axis=1, keepdims=True), 1)) * slow
    own = np.diagonal(covariance_s)[:, None] * slow
    taken = (2 * goes * varies[expert] + goes**2 * own[expert]).sum(axis=1)
    given = (2 * comes * varies[hot] + comes**2 * own[hot]).sum(axis=1, keepdims=True)
    given = given + 2 * here * varies[hot] + here**2 * own[hot]
    both = (goes * slow) @ comes.T + (goes * slow)[np.arange(len(spare)), worker][:, None] * here.T
    return np.asarray(taken[:, None] + given[:, worker].T + 2 * covariance_s[expert[:, None], hot] * both)
