"""The experts that one worker holds, and the function by which the trunk's MoE layers call them.

The dispatcher (model/exchange/dispatch.py) carries tokens between workers. A LayerExperts keeps and computes the
experts of one layer; `fit` in model/fitting/fit.py chooses it.

Legend: R rows (tokens sent to this worker), H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from elastic_moe.model.experts.cpu import CpuExperts
from elastic_moe.model.experts.interface import LayerExperts, SlottedExperts, Tensors
from elastic_moe.model.experts.stacked import StackedExperts, keep_together, read_together
from elastic_moe.model.experts.tiered_stacks import TieredStacks
from elastic_moe.model.native.layers import JointExperts
from elastic_moe.model.transformers_private import ALL_EXPERTS_FUNCTIONS

NAME = "emoe"
"""The name of our experts function in transformers' registry."""

Forward = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]"""


class ExpertStore:
    """Holds experts by (layer, logical expert), and computes them over the rows that were sent to this worker."""

    def __init__(self, layers: Sequence[LayerExperts]) -> None:
        """`layers` hold and compute the experts of each MoE layer, in order. They hold no expert yet."""
        self._layers = layers

    @property
    def slotted(self) -> list[SlottedExperts] | None:
        """The layers, if all of them can compute experts from slots of a cache; otherwise None."""
        found: list[SlottedExperts] = [layer for layer in self._layers if isinstance(layer, CpuExperts | TieredStacks)]
        return found if len(found) == len(self._layers) else None

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def graph_memory(self) -> list[object] | None:
        """What a CUDA graph of `forward` reads, by layer: a graph is right as long as all are the same objects. None if
        a layer's forward needs the CPU."""
        found: list[object] = []
        for layer in self._layers:
            memory = layer.memory if isinstance(layer, StackedExperts) else None
            if memory is None:
                return None
            found.append(memory)
        return found

    @property
    def native(self) -> bool:
        """Whether the native library computes every layer."""
        return all(isinstance(layer, CpuExperts) and layer.native is not None for layer in self._layers)

    def native_layer(self, layer: int) -> tuple[int | float | None, ...]:
        """The layer's held experts, as arguments of native functions. Call it only if `native` is true."""
        experts = self._layers[layer]
        assert isinstance(experts, CpuExperts)
        assert experts.native is not None
        return experts.native.arguments

    def joint(self, *exchange: Any) -> JointExperts:
        """All layers with the experts held now, for native functions. Call it only if `native` is true.

        `exchange` are the further arguments of JointExperts.
        """
        first = self._layers[0]
        assert isinstance(first, CpuExperts)
        assert first.native is not None
        return JointExperts(first.native.lib, [self.native_layer(layer) for layer in range(self.num_layers)], *exchange)

    def reserve(self, counts: Sequence[int]) -> None:
        """Make room for `counts` [L] experts of each layer, which will be put before any step."""
        for layer, count in zip(self._layers, counts, strict=True):
            layer.reserve(count)

    def put(self, layer: int, expert: int, tensors: Tensors, *, borrowed: bool = False) -> None:
        """Hold an expert. The store owns the tensors from now on; it copies `borrowed` ones."""
        self._layers[layer].put(expert, tensors, borrowed=borrowed)

    def get(self, layer: int, expert: int) -> Tensors:
        """The expert's tensors, which another store's `put` accepts. Raises KeyError if the expert is not held."""
        return self._layers[layer].get(expert)

    def reading(self, pairs: Sequence[tuple[int, int]]) -> AbstractContextManager[dict[tuple[int, int], Tensors]]:
        """The tensors of those experts, given as (layer, expert), that are held here, for what is launched within the
        block (read_together)."""
        if stacked := self._stacked:
            return read_together(stacked, pairs)
        return nullcontext({(layer, e): self.get(layer, e) for layer, e in pairs if e in self.held(layer)})

    def held(self, layer: int) -> frozenset[int]:
        return self._layers[layer].held()

    def keep_only(self, experts: Sequence[Iterable[int]]) -> None:
        """Drop all experts that are not in `experts` ([L] sets of logical experts). Call it between two steps only."""
        wanted = list(map(frozenset, experts))
        if stacked := self._stacked:
            keep_together(stacked, wanted)
            return
        for layer, kept in zip(self._layers, wanted, strict=True):
            layer.keep_only(kept)

    def release(self) -> None:
        """Free the memory in which experts lay until the last flip."""
        for layer in self._stacked or ():
            layer.release()

    @property
    def _stacked(self) -> list[StackedExperts] | None:
        """The layers, if all of them are stacked."""
        found = [layer for layer in self._layers if isinstance(layer, StackedExperts)]
        return found if len(found) == len(self._layers) else None

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    def forward(self, layer: int, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """Weighted sum over those of each row's experts that are held here: [R, H]. ABSENT choices are left out."""
        return self._layers[layer].forward(x_RH, index_RK, weight_RK)

    def sums(self, layer: int, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """As `forward`, for sums to which other workers add theirs: on CPU in float64 where tokens are in float32."""
        experts = self._layers[layer]
        return (experts.sums if isinstance(experts, CpuExperts) else experts.forward)(x_RH, index_RK, weight_RK)


def attach(modules: Sequence[nn.Module], forward: Forward) -> None:
    """Make the trunk's expert modules call `forward` from now on, with the number of their layer."""
    for layer, module in enumerate(modules):
        # these are bare attributes, since registered ones would be in the state dict
        object.__setattr__(module, "emoe_layer", layer)
        object.__setattr__(module, "emoe_forward", forward)


def _experts_function(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    out: Tensor = module.emoe_forward(module.emoe_layer, hidden, top_k_index, top_k_weights)  # type: ignore[operator]
    return out


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_function)
