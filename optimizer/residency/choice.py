"""How each worker's fast memory is dealt over the layers, so that all layers together wait as little as possible.

Workers wait for one another in every layer, so room in a layer helps only as far as the others have it too. First all
workers deal alike; then each in turn deals again, the best way while the others stay. Both are exact, by dynamic
programming over the layers.

Legend: L MoE layers, W workers, n experts of a worker in a layer, D experts that a device holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

PASSES = 2
"""Rounds in which every worker deals again."""

NEVER_S = 1e9
"""Seconds that stand for a number of slots which a layer may not have."""

TIE = 1e-6
"""Weight of a second that no layer waits for, because another worker takes longer or computing does."""


def dealt(
    outside: Sequence[FloatArray],
    budgets: IntArray,
    busy: FloatArray,
    slope: FloatArray,
    rent: FloatArray,
    own: float = 1.0,
) -> IntArray:
    """[L, W] slots of each layer on each worker.

    `outside` [W] of [L, n+1]: seconds that a worker fetches in a layer with 0 .. n slots, or NEVER_S;
    `budgets` [W]; `busy` [L] seconds for which the layer lasts anyway; `slope` [L] seconds for each
    second that any worker fetches; `rent` [W] seconds for each slot; `own` seconds for each second of the slowest one.
    """
    rooms = _alike(outside, budgets, busy, slope, rent, own)
    seconds = np.stack([_at(curve, room) for curve, room in zip(outside, rooms, strict=True)])
    for _ in range(PASSES if len(outside) > 1 else 1):
        before = seconds.copy()
        for rank, curve in enumerate(outside):
            others = np.delete(seconds, rank, axis=0)
            most = others.max(axis=0, initial=0.0)[:, None]
            waits = own * np.maximum(curve, most) + slope[:, None] * (curve + others.sum(axis=0)[:, None])
            costs = np.maximum(waits, busy[:, None]) + TIE * curve + rent[rank] * np.arange(curve.shape[1])
            rooms[rank] = split(costs, int(budgets[rank]))
            seconds[rank] = _at(curve, rooms[rank])
        if np.array_equal(before, seconds):
            break
    return np.stack(rooms, axis=1)


def _alike(
    outside: Sequence[FloatArray], budgets: IntArray, busy: FloatArray, slope: FloatArray, rent: FloatArray, own: float
) -> list[IntArray]:
    """[W] of [L] slots: the same on all workers where their experts and budgets are alike in number, else the best of
    each worker by itself."""
    if len({curve.shape for curve in outside}) > 1 or len(set(budgets.tolist())) > 1:
        rents = [price * np.arange(curve.shape[1]) for price, curve in zip(rent, outside, strict=True)]
        costs = [curve + price for curve, price in zip(outside, rents, strict=True)]
        return [split(each, int(budget)) for each, budget in zip(costs, budgets, strict=True)]
    curves = np.stack(outside)
    waits = own * curves.max(axis=0) + slope[:, None] * curves.sum(axis=0)
    rents = rent.sum() * np.arange(curves.shape[2])
    room = split(np.maximum(waits, busy[:, None]) + TIE * curves.sum(axis=0) + rents, int(budgets[0]))
    return [room.copy() for _ in outside]


def _at(curve: FloatArray, room: IntArray) -> FloatArray:
    return np.asarray(curve[np.arange(len(curve)), room])


def split(costs: FloatArray, budget: int) -> IntArray:
    """[L] slots of each layer, at most `budget` in all, at the least sum of costs [L, n+1] for 0 .. n slots."""
    layers, most = costs.shape
    best, choices = np.zeros(budget + 1), np.empty((layers, budget + 1), dtype=np.intp)
    for layer in range(layers):
        before = np.concatenate([np.full(most - 1, np.inf), best])
        total = np.lib.stride_tricks.sliding_window_view(before, most) + costs[layer, ::-1]
        choices[layer] = most - 1 - total.argmin(axis=1)
        best = total.min(axis=1)
    slots, left = np.empty(layers, dtype=np.intp), budget
    for layer in range(layers - 1, -1, -1):
        slots[layer] = choices[layer, left]
        left -= slots[layer]
    return slots
