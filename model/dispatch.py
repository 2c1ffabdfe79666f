"""Carries tokens to the workers of their experts and back: dynamic gating over any transport.

Sizes are exact: no capacity, no padding, no dropped token. A token goes once to each worker that holds one of its
experts, however many, and comes back as one partial sum from each (Huang et al., arXiv 2303.06182, section V).
For few tokens over collectives everyone sends everything to everyone instead: the sizes are then known from the
step's plan, which saves an exchange of sizes.

Legend: T tokens of this worker, R rows sent to one worker, H hidden, K experts per token, W workers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.placement import EMPTY, Placement
from model.experts import ABSENT, ExpertStore
from model.routing_counter import RoutingCounter
from model.transport import CollectiveTransport, Transport

DENSE_TOKENS = 16
"""Up to so many tokens in the whole step, all-gather is cheaper than an exchange of sizes and an all-to-all."""


def route_table(placement: Placement, rank: int) -> Tensor:
    """[L, E] the rank whose replica serves the tokens of worker `rank`.

    A replica on the worker itself, else the workers that lack one take the replicas in turn: traffic is least and
    the load of a replicated expert is spread. Depends on placement and rank alone, so it is decided once an epoch.
    """
    size = len(placement.workers)
    owners = placement.slot_to_worker
    held = np.zeros((placement.num_layers, size, placement.num_logical_experts), dtype=bool)
    for layer in range(placement.num_layers):
        used = placement.physical_to_logical_map[layer] != EMPTY
        held[layer, owners[used], placement.physical_to_logical_map[layer][used]] = True
    # how many workers before this one lack the expert, too
    turn = (~held[:, :rank]).sum(1)
    copies = held.sum(1)
    nth = held.cumsum(1) == (turn % copies + 1)[:, None]
    table = (nth & held).argmax(1)
    table[held[:, rank]] = rank
    return torch.from_numpy(table.astype(np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What an empty step must know of a layer: hidden size, choices per token, dtype of the hidden state."""

    hidden: int
    top_k: int
    dtype: torch.dtype


class Dispatcher:
    """The expert side of one epoch on one worker. The local transport is the oracle of the others."""

    def __init__(
        self,
        placement: Placement,
        rank: int,
        store: ExpertStore,
        transport: Transport,
        *,
        device: torch.device,
        dense_tokens: int = DENSE_TOKENS,
    ) -> None:
        self._store = store
        self._transport = transport
        self._rank = rank
        self._routes = route_table(placement, rank).to(device)
        # shared memory carries sizes for nothing, so only collectives gain from knowing them
        self._dense_tokens = dense_tokens if isinstance(transport, CollectiveTransport) else 0
        self._tokens_per_rank: Sequence[int] = ()
        self.counter: RoutingCounter | None = None

    def begin(self, tokens_per_rank: Sequence[int], counter: RoutingCounter | None) -> None:
        """A step begins. `counter` is None for warm-up, which must not count."""
        self._tokens_per_rank = tokens_per_rank
        self.counter = counter

    def forward(self, layer: int, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The layer's experts, wherever they are: [T, H]. Every worker must call it for every layer of a step."""
        if self.counter is not None:
            self.counter.note(index_TK)
        if self._transport.size == 1:
            return self._store.forward(layer, x_TH, index_TK, weight_TK)
        index_TK = index_TK.to(torch.int32)
        weight_TK = weight_TK.float()
        dense = sum(self._tokens_per_rank) <= self._dense_tokens
        rank_TK = self._routes[layer][index_TK.long()]
        rows: list[Tensor | None] = []
        send: list[list[Tensor]] = []
        for rank in range(self._transport.size):
            here = rank_TK == rank
            chosen = None if dense else here.any(1).nonzero().squeeze(1)
            local = torch.where(here, index_TK, ABSENT)
            parts = [local, weight_TK, x_TH]
            rows.append(chosen)
            send.append(parts if chosen is None else [part.index_select(0, chosen) for part in parts])
        row = row_bytes(x_TH.shape[1], index_TK.shape[1], x_TH.dtype)
        received = self._transport.all_to_all(send, [n * row for n in self._tokens_per_rank] if dense else None)
        y, counts = self._compute(layer, received, send[self._rank], x_TH, index_TK.shape[1])
        return self._combine(y, counts, rows, x_TH)

    def idle(self, shapes: Sequence[LayerShape], device: torch.device) -> None:
        """Take part in a step without tokens of one's own: the trunk is not run, the experts are."""
        for layer, shape in enumerate(shapes):
            self.forward(
                layer,
                torch.empty(0, shape.hidden, dtype=shape.dtype, device=device),
                torch.empty(0, shape.top_k, dtype=torch.int64, device=device),
                torch.empty(0, shape.top_k, device=device),
            )

    def _compute(
        self, layer: int, received: Sequence[Tensor], own: Sequence[Tensor], x_TH: Tensor, top_k: int
    ) -> tuple[Tensor, list[int]]:
        """One pass over all ranks' rows, so that an expert's weights are read once. Returns sums and rows per rank."""
        row = row_bytes(x_TH.shape[1], top_k, x_TH.dtype)
        parts: list[Sequence[Tensor]] = []
        for rank, raw in enumerate(received):
            if rank == self._rank:
                parts.append(own)
                continue
            count = raw.numel() // row
            index, weight, hidden = torch.split(
                raw, [count * top_k * 4, count * top_k * 4, raw.numel() - count * top_k * 8]
            )
            parts.append(
                (
                    index.view(torch.int32).view(count, top_k),
                    weight.view(torch.float32).view(count, top_k),
                    hidden.view(x_TH.dtype).view(count, -1) if count else x_TH[:0],
                )
            )
        index, weight, hidden = (torch.cat([part[i] for part in parts]) for i in range(3))
        return self._store.forward(layer, hidden, index, weight), [len(part[0]) for part in parts]

    def _combine(self, y: Tensor, counts: Sequence[int], rows: Sequence[Tensor | None], x_TH: Tensor) -> Tensor:
        """Send partial sums home and add up what comes back, in rank order."""
        parts = torch.split(y, list(counts))
        size = x_TH.shape[1] * x_TH.dtype.itemsize
        known = [size * (len(x_TH) if chosen is None else len(chosen)) for chosen in rows]
        # how much comes back is always known: as many rows as were sent
        received = self._transport.all_to_all([[part] for part in parts], known)
        out_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        for rank, chosen in enumerate(rows):
            partial = parts[rank] if rank == self._rank else received[rank].view(x_TH.dtype).view(-1, x_TH.shape[1])
            if chosen is None:
                out_TH += partial
            else:
                out_TH.index_add_(0, chosen, partial.float())
        return out_TH.to(x_TH.dtype)


def row_bytes(hidden: int, top_k: int, dtype: torch.dtype) -> int:
    """Of one token on its way: choices (int32), weights (float32), hidden state."""
    return top_k * 8 + hidden * dtype.itemsize
