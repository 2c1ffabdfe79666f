"""A run of decoder layers in one call: see layers.cpp.

Legend: L layers, T tokens of the step, H hidden, D head size, K experts per token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_moe.model.native.attention import NativeBatch
from elastic_moe.model.native.block import AttentionBlock
from elastic_moe.model.native.router import Router
from elastic_moe.model.native.structs import Experts, Layer


class JointExperts:
    """All layers' experts in one epoch, wherever they are."""

    def __init__(
        self,
        lib: ctypes.CDLL,
        layers: Sequence[tuple[int | float, ...]],
        routes_LWE: Tensor | None = None,
        exchange: int | None = None,
        check: Callable[[int], None] = lambda status: None,
    ) -> None:
        """`layers` are arguments of native functions, good for the whole epoch; `exchange` and `routes_LWE` (int16)
        lead to the other workers. `check` raises StepAborted for what a native function returns.
        """
        self.lib = lib
        self.exchange = exchange
        self.check = check
        self._routes_LWE = routes_LWE
        routes = [None if routes_LWE is None else routes_LWE[n].data_ptr() for n in range(len(layers))]
        self.layers = (Experts * len(layers))(*(Experts(*a, r) for a, r in zip(layers, routes, strict=True)))

    def idle(self, threads: int) -> None:
        """Serve the others' tokens in all layers of a step. Blocks on them; raises StepAborted where one is gone."""
        self.check(self.lib.emoe_layers_idle(self.layers, len(self.layers), self.exchange, threads))


@dataclass(frozen=True, slots=True, kw_only=True)
class JointLayer:
    """A decoder layer of nothing but attention, a router and experts."""

    block: AttentionBlock
    router: Router
    attention_layer: int
    """Of the KV cache."""


class JointLayers:
    """Decoder layers that follow one another."""

    def __init__(self, layers: Sequence[JointLayer]) -> None:
        self._kept = layers
        self._hidden = layers[0].router.packed.depth
        self._top_k = layers[0].router.top_k
        self.head_size = layers[0].block.head_size
        self._layers = (Layer * len(layers))(
            *(
                Layer(
                    block=layer.block.address,
                    router=layer.router.packed.data.data_ptr(),
                    num_experts=layer.router.packed.columns,
                    top_k=layer.router.top_k,
                    normalise=layer.router.normalises,
                    rounds=layer.router.dtype == torch.bfloat16,
                )
                for layer in layers
            )
        )
        self._cache: Any = None

    def __call__(
        self,
        batch: NativeBatch,
        cache: Any,
        experts: JointExperts,
        x_TH: Tensor,
        cosines_TD: Tensor,
        sines_TD: Tensor,
        window: int | None,
        expert_threads: int,
    ) -> tuple[Tensor, Tensor]:
        """(what the layers make of x [T, H], experts chosen [L, T, K]). Blocks on the other workers.

        `cache` is the KVCache. Raises StepAborted where a worker is gone.
        """
        if cache is not self._cache:
            for row, layer in zip(self._layers, self._kept, strict=True):
                row.keys, row.values = (store.data_ptr() for store in cache.stores(layer.attention_layer))
            self._cache = cache
        out_TH = x_TH.clone()
        index_LTK = torch.empty(len(self._layers), len(x_TH), self._top_k, dtype=torch.int64)
        status = experts.lib.emoe_layers(
            self._layers,
            experts.layers,
            len(self._layers),
            experts.exchange,
            self._hidden,
            out_TH.data_ptr(),
            len(x_TH),
            cosines_TD.data_ptr(),
            sines_TD.data_ptr(),
            *batch.described,
            window or 0,
            index_LTK.data_ptr(),
            torch.get_num_threads(),
            expert_threads,
        )
        experts.check(status)
        return out_TH, index_LTK
