"""What stands in for statistics that were not counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from optimizer.problem import FloatArray, PlacementProblem


def covariance_between_parts(parts: npt.ArrayLike) -> FloatArray:
    """[L, E, E] covariance of a window's loads, from loads of its parts [P, L, E] (requests, or stretches of time).

    Parts are taken as drawn independently, each with the window's mix: the covariance of their sum is the sum of their
    deviations' outer products. Tokens squared.
    """
    loads = np.asarray(parts, dtype=np.float64)
    size = loads.sum(axis=2, keepdims=True)
    mix = loads.sum(axis=0) / np.maximum(size.sum(axis=0), 1e-300)
    deviation = (loads - size * mix).transpose(1, 0, 2)
    return np.asarray(np.matmul(deviation.transpose(0, 2, 1), deviation))


def independent_pairs(problem: PlacementProblem) -> FloatArray:
    """[L, E, E] co-activation if a token's K choices were drawn by load, one apart from another."""
    chance = problem.loads / problem.loads.sum(axis=1, keepdims=True)
    repeats = problem.top_k * (problem.top_k - 1) * problem.tokens
    pairs = chance[:, :, None] * chance[:, None, :] * repeats[:, None, None]
    return _without_diagonal(pairs)


def estimate_coactivation(problem: PlacementProblem) -> FloatArray:
    """[L, E, E] co-activation from transitions: two experts that follow the same experts are chosen together.

    Given the expert before, a token's choices are taken as independent:
    C_l[f, g] = (K-1)/K * sum_e T[e, f] T[e, g] / (K load_e), and layer 0, which nothing precedes, from what follows it.
    Without transitions the choices are independent altogether.
    """
    if problem.transitions is None or problem.num_layers < 2 or problem.top_k < 2:
        return independent_pairs(problem)
    share = (problem.top_k - 1) / problem.top_k**2
    before = problem.transitions / np.maximum(problem.loads[:-1, :, None], 1e-300)
    later = share * np.matmul(problem.transitions.transpose(0, 2, 1), before)
    after = problem.transitions[0] / np.maximum(problem.loads[1][None, :], 1e-300)
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
