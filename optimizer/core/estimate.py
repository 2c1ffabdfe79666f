"""Estimates statistics that were not counted: covariances of loads, co-activation and transitions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from elastic_moe.optimizer.subjects.memory import Variation

if TYPE_CHECKING:
    from elastic_moe.optimizer.core.problem import FloatArray, PlacementProblem

FEWEST_PARTS = 3
"""Least number of stretches of time from which the variation of loads is estimated."""

LEADING = 3
"""Number of factors common to all layers that are used. Weaker ones add nothing to what each layer shows by itself."""

LAYER_SHARE = 0.7
"""Weight of the variation that each layer shows by itself, beside those factors. Like `PlacementProblem.caution`, it
was set by planning on some requests and measuring on others."""

LEAST_EXPECTED = 0.01
"""Least expected load, as a share of an average expert's load in a part: below it, chance would dominate a deviation
that is divided by its spread."""


RUN = 32
"""Number of tokens in a run of one request. Runs give many more samples than requests of which experts rise
together."""

PRIOR = 0.008
"""Strength of the prior for a change of subject, with much evidence. It is the strongest that leaves plans nine tenths
of their gain on the subject that they were profiled on; on other subjects they then cost no more than greedy's, on
average. Set on first halves of traces only (docs/benchmarks/placement.md)."""

PRIOR_REQUESTS = 8.0
"""Number of requests at which the prior is twice as strong: the fewer were seen, the less they say of what comes."""


def covariance_between_parts(parts: npt.ArrayLike) -> FloatArray:
    """[L, E, E] covariance of a window's loads, from loads of its parts [P, L, E] (requests, or stretches of time).

    The estimate assumes that parts are drawn independently, each with the window's mix. Then the covariance of their
    sum is the sum of the outer products of their deviations, in tokens squared.
    """
    return _sum_of_products(_expected_and_deviation(np.asarray(parts, dtype=np.float64))[1])


def _sum_of_products(deviation: FloatArray) -> FloatArray:
    """[L, E, E] sum of products of every two experts' deviations [P, L, E]."""
    by_layer = deviation.transpose(1, 0, 2)
    return np.asarray(np.matmul(by_layer.transpose(0, 2, 1), by_layer))


def _expected_and_deviation(loads: FloatArray) -> tuple[FloatArray, FloatArray]:
    """[P, L, E] the load of each part if it had the mix of all parts, and the difference from that."""
    size = loads.sum(axis=2, keepdims=True)
    expected = size * (loads.sum(axis=0) / np.maximum(size.sum(axis=0), 1e-300))
    return expected, loads - expected


def believable(covariance: FloatArray, parts: int) -> FloatArray:
    """[L] share of the squared correlations [L, E, E] that sampling does not explain. Experts that vary independently
    have a squared correlation of 1/parts on average."""
    spread = np.sqrt(np.einsum("lee->le", covariance))
    correlation = covariance / np.maximum(spread[:, :, None] * spread[:, None, :], 1e-300)
    experts = covariance.shape[1]
    squared = ((correlation**2).sum(axis=(1, 2)) - (spread > 0).sum(axis=1)) / max(experts * (experts - 1), 1)
    return np.asarray(np.clip(1 - 1 / (parts * np.maximum(squared, 1e-300)), 0.0, 1.0))


def shrunk_covariance(covariance: FloatArray, parts: int) -> FloatArray:
    """[L, E, E] the covariance, with the part between different experts reduced to the believable share.

    Few parts give a covariance of low rank, and a planner would fill workers with experts that happened not to vary.
    Shrinkage towards the diagonal, after Ledoit and Wolf 2004.
    """
    share = believable(covariance, parts)[:, None, None]
    return np.asarray(np.where(np.eye(covariance.shape[1], dtype=bool), covariance, covariance * share))


def common_factors(parts: npt.ArrayLike) -> FloatArray:
    """[L, E, E] covariance along the LEADING directions in which the loads of all layers vary together, from loads of
    parts [P, L, E]. These directions are topics, of which later windows hold more or less.

    A part's scores are found over all layers at once, so a factor is known far better than from one layer's loads: the
    principal components of correspondence analysis (Benzecri 1973), deviations over the square root of what was
    expected. The excess of each component over the median one is kept, since the median shows the size of chance.
    """
    loads = np.asarray(parts, dtype=np.float64)
    expected, deviation = _expected_and_deviation(loads)
    least = np.maximum(LEAST_EXPECTED * expected.mean(axis=2, keepdims=True), 1e-300)
    scaled = (deviation / np.sqrt(np.maximum(expected, least))).reshape(len(loads), -1)
    strength, scores = np.linalg.eigh(scaled @ scaled.T)
    # deviations sum to nearly 0, so the weakest component is left out
    chance = np.median(strength[1:]) if len(loads) > 1 else np.inf
    kept = np.clip(1 - chance / np.maximum(strength[-LEADING:], 1e-300), 0.0, 1.0)
    return _sum_of_products(np.einsum("pk,ple->kle", scores[:, -LEADING:] * np.sqrt(kept), deviation))


def drift_covariance(of_layers: FloatArray, parts: npt.ArrayLike) -> FloatArray:
    """[L, E, E] covariance of the loads in the next window: `of_layers` [L, E, E], which each layer shows by itself,
    and the factors common to all layers, along which windows differ by more than randomly drawn requests would."""
    return LAYER_SHARE * of_layers + common_factors(parts)


def covariance_of_window(parts: npt.ArrayLike) -> FloatArray | None:
    """[L, E, E] covariance from the loads of stretches of time [P, L, E]; None where there are too few to compare."""
    loads = np.asarray(parts, dtype=np.float64)
    if len(loads) < FEWEST_PARTS:
        return None
    return drift_covariance(shrunk_covariance(covariance_between_parts(loads), len(loads)), loads)


def expected_covariance(
    loads: npt.ArrayLike,
    parts: npt.ArrayLike | None,
    variation: Variation | None,
    runs: npt.ArrayLike | None = None,
    requests: int = 1,
) -> FloatArray | None:
    """[L, E, E] covariance of a window's loads [L, E]: what its parts [P, L, E] show and what was remembered of earlier
    ones, averaged by the number of stretches that each was seen on, and the prior for a change of subject, where short
    runs [Q, L, E] of `requests` requests are given. None where nothing is known."""
    counted = np.asarray(loads, dtype=np.float64)
    seen = _seen_covariance(counted, parts, variation)
    if runs is None or len(np.asarray(runs)) < FEWEST_PARTS:
        return seen
    prior = prior_covariance(counted, runs, requests)
    return prior if seen is None else seen + prior


def _seen_covariance(loads: FloatArray, parts: npt.ArrayLike | None, variation: Variation | None) -> FloatArray | None:
    shown = None if parts is None else covariance_of_window(parts)
    if variation is None:
        return shown
    number = 1 if parts is None else max(len(np.asarray(parts)), 1)
    known = variation.of_window(loads, number)
    if shown is None:
        return known
    return np.asarray((number * shown + variation.stretches * known) / (number + variation.stretches))


def covariance_of_requests(requests: npt.ArrayLike, chunks: npt.ArrayLike) -> FloatArray:
    """[L, E, E] covariance from the loads of whole requests [P, L, E] and of short runs within them [Q, L, E], with the
    prior for a change of subject."""
    loads = np.asarray(requests, dtype=np.float64)
    seen = drift_covariance(blended_covariance(requests, chunks), requests)
    return np.asarray(seen + prior_covariance(loads.sum(axis=0), chunks, len(loads)))


def prior_covariance(loads: FloatArray, runs: npt.ArrayLike, requests: int) -> FloatArray:
    """[L, E, E] covariance of loads [L, E] if the subject of the traffic changes, from runs [Q, L, E] of `requests`
    requests of one subject.

    Between subjects an expert's load deviates by about the root of its load (on the traces at hand: its power 0.3 to
    0.5), and experts rise and fall together as they do between short runs of one subject: of what one subject shows,
    that predicts other subjects best (docs/benchmarks/placement.md). It is the stronger the fewer requests there are.
    """
    strength = PRIOR * (1 + PRIOR_REQUESTS / max(requests, 1))
    parts = np.asarray(runs, dtype=np.float64)
    together = shrunk_covariance(covariance_between_parts(parts), len(parts))
    spread = np.sqrt(np.einsum("lee->le", together))
    correlation = together / np.maximum(spread[:, :, None] * spread[:, None, :], 1e-300)
    # the sum of all squared deviations over expected loads, which is near 1 between subjects, is shared by all experts
    deviation = np.sqrt(loads * loads.sum(axis=1, keepdims=True) / loads.shape[1])
    return np.asarray(strength * correlation * (deviation[:, :, None] * deviation[:, None, :]))


def blended_covariance(requests: npt.ArrayLike, chunks: npt.ArrayLike) -> FloatArray:
    """[L, E, E] covariance from the loads of few whole requests [P, L, E] and of many short runs within them [Q, L, E].

    Runs show better which experts rise together, but vary less than requests do. Both covariances are shrunk, the one
    of the runs is scaled to the variance of whole requests, and they are averaged by their believable shares.
    """
    loads, runs = np.asarray(requests, dtype=np.float64), np.asarray(chunks, dtype=np.float64)
    whole, within = covariance_between_parts(loads), covariance_between_parts(runs)
    variance = np.trace(within, axis1=1, axis2=2)
    scale = np.trace(whole, axis1=1, axis2=2) / np.where(variance > 0, variance, 1.0)
    trust = np.stack([believable(whole, len(loads)), believable(within, len(runs))])[:, :, None, None]
    total = np.maximum(trust.sum(axis=0), 1e-300)
    blended = (trust[0] ** 2 * whole + trust[1] ** 2 * within * scale[:, None, None]) / total
    experts = np.arange(whole.shape[1])
    blended[:, experts, experts] = whole[:, experts, experts]
    return np.asarray(blended)


def independent_pairs(problem: PlacementProblem) -> FloatArray:
    """[L, E, E] co-activation if the K choices of a token were drawn by load and independently."""
    chance = problem.loads / problem.loads.sum(axis=1, keepdims=True)
    repeats = problem.top_k * (problem.top_k - 1) * problem.tokens
    pairs = chance[:, :, None] * chance[:, None, :] * repeats[:, None, None]
    return _without_diagonal(pairs)


def estimate_coactivation(problem: PlacementProblem) -> FloatArray:
    """[L, E, E] co-activation from transitions: two experts that follow the same experts are chosen together.

    The estimate assumes that a token's choices are independent, given its expert in the layer before:
    C_l[f, g] = (K-1)/K * sum_e T[e, f] T[e, g] / (K load_e), with load_e = sum_f T[e, f] / K.
    Layer 0 has no layer before, so it is estimated from layer 1 in the same way. Without transitions, all choices are
    assumed to be independent.
    """
    if problem.transitions is None or problem.num_layers < 2 or problem.top_k < 2:
        return independent_pairs(problem)
    share = (problem.top_k - 1) / problem.top_k**2
    counted = problem.transitions / problem.top_k
    before = problem.transitions / np.maximum(counted.sum(axis=2, keepdims=True), 1e-300)
    later = share * np.matmul(problem.transitions.transpose(0, 2, 1), before)
    after = problem.transitions[0] / np.maximum(counted[0].sum(axis=0), 1e-300)
    first = share * np.matmul(problem.transitions[0], after.T)
    return _without_diagonal(np.concatenate([first[None], later]))


def estimate_transitions(problem: PlacementProblem) -> FloatArray:
    """[L-1, E, E] transitions if the choices of adjacent layers were independent."""
    first, second = problem.loads[:-1], problem.loads[1:]
    return np.asarray(first[:, :, None] * second[:, None, :] / problem.tokens[:-1, None, None])


def _without_diagonal(pairs: FloatArray) -> FloatArray:
    experts = np.arange(pairs.shape[1])
    pairs[:, experts, experts] = 0.0
    return pairs
