"""Computes MoE layers of workers on one node in native code: one call per layer, from a worker's tokens to their sums.

Legend: T tokens of this worker, H hidden, K experts per token, L MoE layers, W workers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic_moe.cluster.placement import Placement
from elastic_moe.model.exchange.counter import Notes
from elastic_moe.model.exchange.dispatcher import Dispatcher, route_table
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.native.exchange import NativeExchange


class NativeDispatcher(Dispatcher):
    """The dispatcher of a native exchange. TransportDispatcher is its oracle; partial sums travel in float32 here.
    Where experts have replicas, these are chosen by a round's own counts, and sums travel in two pieces."""

    def __init__(self, placement: Placement, rank: int, store: ExpertStore, exchange: NativeExchange) -> None:
        super().__init__()
        self._store = store
        self._exchange = exchange
        routes = [route_table(placement, r) for r in range(exchange.size)]
        self._routes_LWE = torch.stack(routes, dim=1).to(torch.int16).contiguous()
        self.joint = store.joint(self._routes_LWE, exchange.handle, exchange.check)

    @property
    def threads(self) -> int:
        return self._exchange.threads or super().threads

    def begin(self, tokens_per_rank: Sequence[int], counter: Notes | None) -> None:
        super().begin(tokens_per_rank, counter)
        self._exchange.begin(tokens_per_rank)

    def leave_trunk(self) -> None:
        self._exchange.decline()

    def finish(self) -> None: ...

    def _forward(self, layer: int, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        experts = self._store.native_layer(layer)
        return self._exchange.layer(experts, self._routes_LWE[layer], x_TH, index_TK, weight_TK)
