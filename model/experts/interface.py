"""The interface to the experts of one layer. `layer_experts` in model/fitting/fit.py chooses its implementation.

Legend: R rows (tokens sent to this worker), H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Set
from typing import Protocol

from torch import Tensor

from elastic_moe.model.record_layout import RecordLayout

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


Next = Callable[[list[int], list[int] | None], list[int]]
"""Brings experts into memory, batch by batch. It is called with all experts of the step that have rows and with the
numbers of these rows, and then with the experts that were computed and None. Returns the experts to compute next, which
are in memory; none when all have been computed. Blocks on the disk, and raises an error if an expert cannot be read.
"""


class SlottedExperts(LayerExperts, Protocol):
    """The experts of one layer of which some lie in slots of a cache (model/tiers/), and come when a step needs them.

    `bind` and `unbind` are called between two products.
    """

    def layout(self, tensors: Tensors) -> RecordLayout:
        """How an expert lies in a slot. `tensors` are those of any expert of the layer. Call it first."""
        ...

    def write(self, tensors: Tensors, slot: Tensor) -> None:
        """Write an expert into a slot in the host's memory. Any thread may call it."""
        ...

    def read(self, slot: Tensor) -> Tensors:
        """The tensors of the expert in a slot in the host's memory, in memory of their own. Any thread may call it."""
        ...

    def bind(self, expert: int, slot: Tensor) -> None:
        """Compute an expert from the slot that it lies in, until `unbind`."""
        ...

    def unbind(self, expert: int) -> None: ...

    def serve(self, experts: Collection[int]) -> None:
        """Steps may need these experts from now on, in whichever tier they lie."""
        ...

    def supply(self, layer: int, next_ready: Next) -> None:
        """Call `next_ready` from now on if a step needs an expert that is not in memory. `layer` is for messages."""
        ...

    def take_steps(self) -> list[list[int]]:
        """The active experts of each step since the last call in which `next_ready` was not called. On a GPU, steps are
        left out for which all that it serves was in memory: it did not have to know them."""
        ...

    def take_error(self) -> BaseException | None:
        """What `next_ready` raised, if that could not pass through the code that called it."""
        ...
