"""How often an expert has tokens in a step, and how much longer than the others the slowest worker waits for experts.

Legend: E experts, W workers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def activity(chance: FloatArray, tokens: float) -> FloatArray:
    """The share of steps in which an expert has tokens, if each of the step's `tokens` chooses it with `chance`.

    It assumes that the tokens of a step belong to different requests, which choose independently.
    """
    return np.asarray(1.0 - (1.0 - np.minimum(chance, 1.0)) ** tokens)


def straggling(active: FloatArray, workers: int) -> float:
    """How far the slowest worker is from the mean (0) towards doing everything alone (1), in expected misses.

    `active` [E] are the shares of steps in which the experts that are not resident have tokens. They are dealt evenly;
    workers wait for one another, so the layer ends with the worker that has the most misses in that step, and not with
    the one that has the most on average. At a few misses in a step the two are far apart.
    """
    mean = float(active.sum()) / workers
    if workers == 1 or mean <= 0:
        return 0.0
    dealt = np.sort(active)[::-1]
    below = np.ones(len(dealt) + 1)
    for first in range(workers):
        share = misses(dealt[first::workers])
        below[: len(share)] *= np.cumsum(share)
    slowest = float((1.0 - below[:-1]).sum())
    return float(np.clip((slowest - mean) / (mean * workers - mean), 0.0, 1.0))


def misses(active: FloatArray) -> FloatArray:
    """[n+1] the chance of 0 .. n misses in a step, where n experts have tokens independently, each with its share."""
    chance = np.ones(1)
    for share in active:
        chance = np.append(chance * (1 - share), 0.0) + np.append(0.0, chance * share)
    return chance
