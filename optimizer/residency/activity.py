"""How often experts have tokens in a step, which of them in the same steps, and what the slowest worker makes of that.

Legend: E experts, W workers.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def activity(chance: FloatArray, tokens: float) -> FloatArray:
    """The share of steps in which an expert has tokens, if each of the step's `tokens` chooses it with `chance`.

    It assumes that the tokens of a step belong to different requests, which choose independently.
    """
    return np.asarray(1.0 - (1.0 - np.minimum(chance, 1.0)) ** tokens)


def activity_covariance(chance: FloatArray, together: FloatArray, tokens: float) -> FloatArray:
    """[E, E] covariance of having tokens in a step, from the chances [E] that a token chooses an expert, and those
    [E, E] that it chooses both of two (the diagonal is ignored). Positive semidefinite, as an estimate need not be."""
    idle = 1.0 - np.minimum(chance, 1.0)
    neither = np.clip(idle[:, None] + idle[None, :] - 1.0 + together, 0.0, 1.0)
    covariance = neither**tokens - np.outer(idle, idle) ** tokens
    active = activity(chance, tokens)
    np.fill_diagonal(covariance, active * (1 - active))
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return np.asarray((vectors * np.maximum(values, 0.0)) @ vectors.T)


def expected_largest(count: int) -> float:
    """The expected largest of `count` independent standard normal numbers: 0 for one, 1.03 for four, 2.5 for 100."""
    at = np.linspace(-8.0, 8.0, 1601)
    below = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in at]) ** count
    # integral of x d(below), by parts
    return float(8.0 - ((below[1:] + below[:-1]) / 2 * np.diff(at)).sum())
