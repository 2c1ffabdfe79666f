"""Which experts one worker keeps in its device, and which in its host memory.

Legend: N experts that the worker serves, over all layers; L MoE layers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]


def in_device(
    value: FloatArray, layer_of: IntArray, layers: int, budget: int, placed: BoolArray, barred: BoolArray
) -> BoolArray:
    """[N] which experts are found in the device whenever they are needed.

    `value` [N]: seconds per step that each saves there; `layer_of` [N]; `budget`: experts that the device holds.
    A layer whose experts do not all fit needs one slot through which the others pass. Those that are `placed` [N] there
    come first, and `barred` [N] ones never.
    """
    held = np.bincount(layer_of, minlength=layers)
    never = np.bincount(layer_of[barred], minlength=layers) > 0
    full = held == 0
    order = np.lexsort((-value, ~placed))
    order = order[~barred[order]]
    while True:
        whole = full[layer_of]
        left = budget - int(held[full].sum()) - int((~full).sum())
        loose = order[~whole[order]]
        inside = whole.copy()
        inside[loose[: max(left, 0)]] = True
        missing = held - np.bincount(layer_of[inside], minlength=layers)
        # a single expert that is left out fits into the slot through which it would pass
        found = (missing <= 1) & ~full & ~never
        if not found.any():
            return inside
        full |= found


def in_host(saving: FloatArray, outside: BoolArray, room: int, placed: BoolArray) -> BoolArray:
    """[N] the experts outside of the device that the host's memory holds: those that save most seconds there, after
    those that are `placed` there."""
    chosen = np.zeros(len(saving), dtype=bool)
    chosen[np.lexsort((-saving, ~placed, ~outside))[:room]] = True
    return np.asarray(chosen & outside & (saving > 0))
