"""The interface to the experts of one layer. `layer_experts` in model/fitting/fit.py chooses its implementation.

Legend: R rows (tokens sent to this worker), H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Protocol

from torch import Tensor

ABSENT = -1
"""In an index of choices, this number stands for an expert that another worker computes."""

Tensors = dict[str, Tensor]
"""One expert's tensors by parameter name. Each has the shape of a row of the stacked parameter."""


class LayerExperts(Protocol):
    """The experts of one layer that a worker holds.

    The thread that runs the steps calls `forward` and `keep_only`. Any thread may call the other methods.
    """

    def reserve(self, count: int) -> None:
        """Make room for `count` experts, which will be put before any step."""
        ...

    def put(self, expert: int, tensors: Tensors, *, borrowed: bool = False) -> None:
        """Hold an expert. A step that is running does not see it.

        The layer owns the tensors from now on. It copies `borrowed` tensors, and keeps none of their memory.
        """
        ...

    def get(self, expert: int) -> Tensors:
        """The expert's tensors, which another layer's `put` accepts. Raises KeyError if the expert is not held."""
        ...

    def held(self) -> frozenset[int]: ...

    def keep_only(self, wanted: Set[int]) -> None:
        """Drop every expert that is not in `wanted`. Experts that were put since the last call may be moved now."""
        ...

    @property
    def nbytes(self) -> int: ...

    def forward(self, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """Weighted sum over those of each row's experts that are held here: [R, H]. ABSENT choices are left out."""
        ...
