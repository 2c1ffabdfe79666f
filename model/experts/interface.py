"""What is asked of the experts of one layer, whatever computes them (see model/backends.py for who does).

Legend: R rows (tokens sent here), H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Protocol

from torch import Tensor

ABSENT = -1
"""In an index of choices: an expert that is computed elsewhere."""

Tensors = dict[str, Tensor]
"""One expert's tensors by parameter name, each shaped as a row of the stacked parameter."""


class LayerExperts(Protocol):
    """`forward` and the flip (`keep_only`) are called by the thread that runs the steps, the rest by any."""

    def reserve(self, count: int) -> None:
        """So many experts are about to be put, before any step."""
        ...

    def put(self, expert: int, tensors: Tensors, *, borrowed: bool = False) -> None:
        """Hold an expert. Its tensors belong to the layer from now on, and of borrowed ones nothing is kept; no step
        that runs sees it."""
        ...

    def get(self, expert: int) -> Tensors:
        """The expert's tensors, good for another layer's `put`. Raises KeyError where it is not held."""
        ...

    def held(self) -> frozenset[int]: ...

    def keep_only(self, wanted: Set[int]) -> None:
        """Drop every other expert. What was put since the last call may find its final place now."""
        ...

    @property
    def nbytes(self) -> int: ...

    def forward(self, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """Weighted sum over each row's experts held here: [R, H]. ABSENT choices count for nothing."""
        ...
