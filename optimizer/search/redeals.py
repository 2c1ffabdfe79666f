"""Prices the change of giving a spare slot to another expert, for one layer: which replicas pay, and where.

Legend: E experts, W workers, P slots that are EMPTY or hold one of several replicas, F experts that might get a
replica.

Swaps keep the number of an expert's replicas; these moves do not. Moves are ranked by their change of load and of
prices between layers, which are frozen as in optimizer.search.swaps. The caller evaluates the few best moves in full.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.cluster.placement import EMPTY
from elastic_moe.optimizer.core.problem import FloatArray, IntArray
from elastic_moe.optimizer.search.swaps import LayerTerms, potential_norm, raised

CANDIDATES = 32
"""Number of experts, those with the most load per replica, that may get a slot."""


def best_redeals(terms: LayerTerms, row: IntArray, most: int) -> list[tuple[int, int]]:
    """(slot, expert to put there) of the `most` moves that promise to gain, the best first."""
    replicas = np.bincount(row[row != EMPTY], minlength=len(terms.load_s))
    spare = np.flatnonzero((row == EMPTY) | (replicas[row] > 1)).astype(np.int32)
    if not len(spare):
        return []
    hot = np.argsort(-terms.load_s / replicas, kind="stable")[:CANDIDATES].astype(np.int32)
    on = np.zeros((len(terms.load_s), len(terms.speed)), dtype=bool)
    on[row[row != EMPTY], terms.owner[row != EMPTY]] = True
    taken_load, taken_place = _taken(terms, row, spare, on)
    given_load, here_load, given_place = _given(terms, hot, on)
    busy = np.add.reduceat(np.where(row != EMPTY, (terms.load_s / replicas)[row], 0.0), terms.first_slot) / terms.speed
    worker = terms.owner[spare]
    after = busy + taken_load[:, None, :] + given_load[None, :, :]
    after[np.arange(len(spare))[:, None], np.arange(len(hot))[None, :], worker[:, None]] += here_load[:, worker].T
    norm = potential_norm(busy, terms.load_power)
    change = (raised(np.maximum(after, 0.0) / norm, terms.load_power)).sum(axis=2)
    change = (change - raised(busy / norm, terms.load_power).sum()) * (norm / 2**terms.load_power)
    change += taken_place[:, None] + given_place[:, worker].T
    change[on[hot][:, worker].T] = np.inf
    best = np.argsort(change, axis=None, kind="stable")[:most]
    chosen = [divmod(int(k), len(hot)) for k in best]
    return [(int(spare[p]), int(hot[f])) for p, f in chosen if change[p, f] < 0]


def _taken(terms: LayerTerms, row: IntArray, spare: IntArray, on: np.ndarray) -> tuple[FloatArray, FloatArray]:
    """([P, W] change of every worker's seconds, [P] of the prices) if each spare slot loses what it holds."""
    expert, worker = row[spare], terms.owner[spare]
    held = expert != EMPTY
    count = np.maximum(on[expert].sum(axis=1), 2)
    load, place = terms.load_s[expert], terms.place_s[expert]
    more = np.where(on[expert], (load * (1 / (count - 1) - 1 / count))[:, None], 0.0)
    more[np.arange(len(spare)), worker] = -load / count
    total = np.where(on[expert], place, 0.0).sum(axis=1)
    price = (total - place[np.arange(len(spare)), worker]) / (count - 1) - total / count
    return np.where(held[:, None], more / terms.speed, 0.0), np.where(held, price, 0.0)


def _given(terms: LayerTerms, hot: IntArray, on: np.ndarray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The change where expert f gets one more replica: ([F, W] of its holders' seconds, [F, W] seconds on the worker
    that gets the replica, [F, W] of the prices by that worker)."""
    count = on[hot].sum(axis=1)[:, None]
    load, place = terms.load_s[hot][:, None], terms.place_s[hot]
    total = np.where(on[hot], place, 0.0).sum(axis=1, keepdims=True)
    less = np.where(on[hot], load * (1 / (count + 1) - 1 / count), 0.0) / terms.speed
    return less, load / (count + 1) / terms.speed, (total + place) / (count + 1) - total / count
