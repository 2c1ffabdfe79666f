"""Several subjects that a placement must serve: how their prices become one.

Legend: C scenarios, L MoE layers, E logical experts.

A scenario is the loads of one subject, with a weight. The price of a placement is its mean over scenarios, blended with
its tail: the mean of the worst quarter of scenarios (conditional value at risk, Rockafellar and Uryasev 2000). The
blend is linear in prices while the order of the scenarios stays, so searches see it as one weight for each scenario.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.errors import PlacementError

FloatArray = npt.NDArray[np.float64]

WORST_SHARE = 0.25
"""Share of the scenarios, by weight, whose mean price is the tail."""


def shares_of(weights: Sequence[float], number: int) -> FloatArray:
    """[C] the weights as shares of 1; even ones where none are given. Raises PlacementError."""
    if not len(weights):
        return np.full(number, 1.0 / max(number, 1))
    given = np.asarray(weights, dtype=np.float64)
    if given.shape != (number,):
        raise PlacementError(f"weights: expected {number}, one for each subject, got {given.size}")
    # written so that a NaN fails too
    if not ((given > 0) & (given < np.inf)).all():
        raise PlacementError(f"weights: expected positive numbers, got {list(weights)}")
    return np.asarray(given / given.sum())


def of_tokens(loads: FloatArray, tokens: FloatArray) -> FloatArray:
    """Loads [..., L, E], scaled so that every layer counts `tokens` [L] choices."""
    return np.asarray(loads * (tokens / np.maximum(loads.sum(axis=-1), 1e-300))[..., None])


def mean_of_scenarios(loads: FloatArray, weights: Sequence[float], tokens: FloatArray) -> FloatArray:
    """[L, E] the mean of loads [C, L, E] by their weights, with `tokens` [L] choices in every layer of each. Raises
    PlacementError for wrong weights."""
    return np.asarray(np.tensordot(shares_of(weights, len(loads)), of_tokens(loads, tokens), axes=1))


def tail_weights(prices: FloatArray, weights: FloatArray) -> FloatArray:
    """[C] weights, which sum to 1, of the worst quarter: the dearest scenarios, the last one in part."""
    order = np.argsort(-prices, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    kept = np.zeros(len(weights))
    kept[order] = np.clip(WORST_SHARE - before, 0.0, weights[order])
    return np.asarray(kept / kept.sum())


def blended_weights(prices: FloatArray, weights: FloatArray, tail: float) -> FloatArray:
    """[C] weights, which sum to 1, under which the sum of `prices` [C] is their mean blended with their tail."""
    if len(weights) == 1:
        return weights
    return np.asarray((1 - tail) * weights + tail * tail_weights(prices, weights))


def blended(prices: FloatArray, weights: FloatArray, tail: float) -> float:
    """(1 - tail) * mean + tail * mean of the worst quarter."""
    return float(blended_weights(prices, weights, tail) @ prices)
