"""Copies of numbers to a device, and how many rows are computed at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_CPU_ELEMENTS = 1 << 17
"""Numbers (rows x vocabulary) that are computed at a time on CPU. Larger temporaries cost page faults: 3 times slower.
"""


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    # a blocking copy would wait for the model's kernels; torch copies the array before this returns
    return torch.from_numpy(array).to(device, non_blocking=True)


def parts(rows: list[int], logits_BV: Tensor) -> Iterator[list[int]]:
    size = len(rows)
    if logits_BV.device.type == "cpu":
        size = max(1, _CPU_ELEMENTS // logits_BV.shape[1])
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
