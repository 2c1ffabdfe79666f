"""The experts that one worker holds, and how the trunk's MoE layers come to them.

Where tokens come from and go to is the dispatcher's business (model/exchange/dispatch.py), how a layer's experts are
kept and computed that of a LayerExperts (`fit` in model/fitting/fit.py chooses it).

Legend: R rows (tokens sent here), H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from elastic_moe.model.experts.cpu import CpuExperts
from elastic_moe.model.experts.interface import LayerExperts, Tensors
from elastic_moe.model.native.layers import JointExperts
from elastic_moe.model.transformers_private import ALL_EXPERTS_FUNCTIONS

NAME = "emoe"
"""Of our experts function in transformers' registry."""

Forward = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]"""


class ExpertStore:
    """Weights by (layer, logical expert), and the sum of a layer's held experts over rows sent here."""

    def __init__(self, layers: Sequence[LayerExperts]) -> None:
        """`layers` hold and compute the experts of each MoE layer, in order; they hold none yet."""
        self._layers = layers

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def native(self) -> bool:
        """Whether every layer's arithmetic is native."""
        return all(isinstance(layer, CpuExperts) and layer.native is not None for layer in self._layers)

    def native_layer(self, layer: int) -> tuple[int | float, ...]:
        """The layer's experts held here, as native functions take them. Only where `native`."""
        experts = self._layers[layer]
        assert isinstance(experts, CpuExperts)
        assert experts.native is not None
        return experts.native.arguments

    def joint(self, *exchange: Any) -> JointExperts:
        """All layers for native functions, as held now; for `exchange` see JointExperts. Only where `native`."""
        first = self._layers[0]
        assert isinstance(first, CpuExperts)
        assert first.native is not None
        return JointExperts(first.native.lib, [self.native_layer(layer) for layer in range(self.num_layers)], *exchange)

    def reserve(self, counts: Sequence[int]) -> None:
        """So many experts of each layer are about to be put, before any step."""
        for layer, count in zip(self._layers, counts, strict=True):
            layer.reserve(count)

    def put(self, layer: int, expert: int, tensors: Tensors, *, borrowed: bool = False) -> None:
        """Hold an expert. Its tensors belong to the store from now on; of borrowed ones nothing is kept."""
        self._layers[layer].put(expert, tensors, borrowed=borrowed)

    def get(self, layer: int, expert: int) -> Tensors:
        """The expert's tensors, good for another store's `put`. Raises KeyError where it is not held."""
        return self._layers[layer].get(expert)

    def held(self, layer: int) -> frozenset[int]:
        return self._layers[layer].held()

    def keep_only(self, experts: Sequence[Iterable[int]]) -> None:
        """Drop what is not in `experts` ([L] sets of logical experts). Not while a step runs that reads it."""
        for layer, wanted in zip(self._layers, experts, strict=True):
            layer.keep_only(frozenset(wanted))

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    def forward(self, layer: int, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """Weighted sum over each row's experts held here: [R, H]. ABSENT choices count for nothing."""
        return self._layers[layer].forward(x_RH, index_RK, weight_RK)


def attach(modules: Sequence[nn.Module], forward: Forward) -> None:
    """From now on the trunk's expert modules hand their tokens to `forward`, saying which layer they are."""
    for layer, module in enumerate(modules):
        # bare attributes, not registered ones: they must not turn up in the state dict
        object.__setattr__(module, "emoe_layer", layer)
        object.__setattr__(module, "emoe_forward", forward)


def _experts_function(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    out: Tensor = module.emoe_forward(module.emoe_layer, hidden, top_k_index, top_k_weights)  # type: ignore[operator]
    return out


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_function)
