"""Carries tokens to the workers of their experts and back: dynamic gating over any transport.

Sizes are exact: there is no capacity, no padding and no dropped token. A token goes once to each worker that holds some
of its experts, and each of these workers returns one partial sum (Huang et al., arXiv 2303.06182, section V). In a step
of few tokens, every worker sends all its tokens to every other worker instead, and the receiver decides which experts
it computes. That takes fewer operators, and the step's plan gives all sizes, so that no exchange of sizes is needed.
In such a step, workers on CPUs deal the experts that lie in no memory among them (dealing.py), and choose replicas by
the step's own counts (optimizer/buffering/replicas.py); else each worker takes its own replica, or one by its rank.
Where GPUs exchange tokens, all workers pad theirs to the same number of rows then, so that the steps of each number can
be recorded as CUDA graphs (graph_pieces.py), with the exchanges between the graphs.

Partial sums are added up in float64 where tokens are in float32. So a token's sum does not depend on which workers
computed its experts.

Legend: T tokens of this worker, R rows sent to one worker, H hidden, K experts per token, W workers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.cluster.placement import Placement
from elastic_moe.model.exchange.counter import Notes
from elastic_moe.model.exchange.dealing import NOBODY, Dealer, Memory
from elastic_moe.model.exchange.dispatcher import Dispatcher, held_table, route_table
from elastic_moe.model.exchange.transports import Transport
from elastic_moe.model.experts.interface import ABSENT
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.foreign_memory import borrowed
from elastic_moe.model.graph_pieces import SIZES, GraphTerms, padded, recording
from elastic_moe.model.staging import to_device
from elastic_moe.optimizer.buffering.replicas import ReplicaChoice

_DENSE_TOKENS_CPU, _DENSE_TOKENS_GPU = 64, 8192


def _dense_tokens(device: torch.device) -> int:
    """The most tokens of a whole step for which sending all to all is cheaper than choosing rows and exchanging sizes.

    On GPUs choosing rows makes the CPU wait twice per layer, and most tokens need an expert on most workers anyway.
    """
    return _DENSE_TOKENS_CPU if device.type == "cpu" else _DENSE_TOKENS_GPU


_DENSE_S = 0.0005
"""Seconds on the slowest link for rows that may prove needless. Choosing rows takes about as long."""


def fits_dense(nbytes: int, slowest_gbps: float | None) -> bool:
    """Whether a step's tokens, of `nbytes` in all, pass the slowest link soon enough to be sent to all."""
    return slowest_gbps is None or nbytes * 8 <= _DENSE_S * slowest_gbps * 1e9


class TransportDispatcher(Dispatcher):
    """PyTorch's operators around any transport. The local transport is the oracle of the others."""

    def __init__(
        self,
        placement: Placement,
        rank: int,
        store: ExpertStore,
        transport: Transport,
        *,
        device: torch.device,
        most_dense: int | None = None,
        slowest_gbps: float | None = None,
        memory: Memory | None = None,
    ) -> None:
        """`most_dense`: tokens of a step up to which all go to all workers; None takes the number for the device.
        `slowest_gbps`: bandwidth of the slowest link between workers, which all of them know; None: links are fast.
        `memory`: what this worker has in memory. All workers give it or none does; without it nothing is dealt.
        """
        super().__init__()
        self._store = store
        self._transport = transport
        self._rank = rank
        routes_WLE = torch.stack([route_table(placement, r) for r in range(transport.size)]).to(device)
        self._routes_LE = routes_WLE[rank]
        experts_E = torch.arange(routes_WLE.shape[2], device=device)
        # [L, W * (1 + E)] for each rank: ABSENT for a row without a token, and for each expert its number if this
        # worker computes it for that rank, else ABSENT
        mine_WLE = torch.where(routes_WLE == rank, experts_E, ABSENT)
        self._mine_LX = F.pad(mine_WLE, (1, 0), value=ABSENT).transpose(0, 1).flatten(1)
        self._most_dense = _dense_tokens(device) if most_dense is None else most_dense
        self._slowest_gbps = slowest_gbps
        if transport.size == 1 and store.native:
            self.joint = store.joint()
        self._dense = False
        self._rows_per_rank: Sequence[int] = ()
        """In dense steps: the rows that each worker sends."""
        self._dealer: Dealer | None = None
        if memory is not None and transport.size > 1 and device.type == "cpu" and not placement.all_resident:
            self._dealer = Dealer(placement, routes_WLE[0].numpy(), memory)
        self._choices: list[ReplicaChoice] = []
        """[L] of replicas; empty where there are none, or none are chosen step by step."""
        if self._dealer is None and transport.size > 1 and device.type == "cpu":
            self._choices = [ReplicaChoice(holds_WE) for holds_WE in held_table(placement)]
        self._source_R = torch.empty(0)
        """In dense steps: [R] for every row of all ranks, where its rank's experts begin in a row of `_mine_LX`."""
        self._sources: dict[int, Tensor] = {}
        """The same for steps that are padded, by the rows of each worker. Recordings read them where they lie."""

    @property
    def deals(self) -> bool:
        return self._dealer is not None

    def graph_terms(self, tokens_per_rank: Sequence[int]) -> GraphTerms | None:
        memory, rows = self._store.graph_memory, None
        if memory is None:
            return None
        if self._transport.size > 1:
            rows = self._common_rows(tokens_per_rank)
            if rows is None:
                return None
            memory = [*memory, self._mine_LX, self._transport]
        return GraphTerms(rows=rows, memory=memory)

    def _common_rows(self, tokens_per_rank: Sequence[int]) -> int | None:
        """The rows that all workers pad their tokens to; None if each sends its tokens alone."""
        rows = padded(max(tokens_per_rank))
        if not self._transport.launches or rows > SIZES[-1] or rows * self._transport.size > self._most_dense:
            return None
        return rows

    def follow(self, previous: Dispatcher) -> None:
        if isinstance(previous, TransportDispatcher) and previous._transport is self._transport:
            self._mine_LX = previous._mine_LX.copy_(self._mine_LX)
            self._sources = previous._sources

    def begin(self, tokens_per_rank: Sequence[int], counter: Notes | None) -> None:
        super().begin(tokens_per_rank, counter)
        size = self._transport.size
        rows = self._common_rows(tokens_per_rank) if size > 1 else None
        self._rows_per_rank = tokens_per_rank if rows is None else [rows] * size
        self._dense = size > 1 and sum(self._rows_per_rank) <= self._most_dense
        if not self._dense:
            return
        if rows is None:
            self._source_R = self._source(tokens_per_rank)
        else:
            if rows not in self._sources:
                self._sources[rows] = self._source(self._rows_per_rank)
            self._source_R = self._sources[rows]

    def _source(self, rows_per_rank: Sequence[int]) -> Tensor:
        begins = (np.arange(len(rows_per_rank)) * (1 + self._routes_LE.shape[1]) + 1).repeat(rows_per_rank)
        [source_R] = to_device([begins[:, None]], self._routes_LE.device)
        return source_R

    def begin_recording(self, rows: int, notes: Notes) -> None:
        self.begin([rows] * self._transport.size, notes)

    def finish(self) -> None:
        self._transport.check()

    def _forward(self, layer: int, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if self._transport.size == 1:
            return self._store.forward(layer, x_TH, index_TK, weight_TK)
        parts = (index_TK.to(torch.int32), weight_TK.float(), x_TH)
        row = row_bytes(x_TH.shape[1], index_TK.shape[1], x_TH.dtype)
        # all workers come to the same answer, since a layer's rows are as wide on each
        dense = self._dense and fits_dense(sum(self._rows_per_rank) * row, self._slowest_gbps)
        try:
            return self._forward_dense(layer, *parts) if dense else self._forward_sparse(layer, *parts)
        except Exception:
            # bytes of an aborted exchange may ask for experts that are not here
            self._transport.check()
            raise

    def _forward_dense(self, layer: int, index_TK: Tensor, weight_TK: Tensor, x_TH: Tensor) -> Tensor:
        tokens, rows = len(x_TH), self._rows_per_rank[self._rank]
        parts = (_filled(index_TK, rows, ABSENT), _filled(weight_TK, rows, 0.0), _filled(x_TH, rows, 0.0))
        word = [] if self._dealer is None else [self._dealer.word(layer)]
        extra = sum(map(len, word))
        row = row_bytes(x_TH.shape[1], index_TK.shape[1], x_TH.dtype)
        received = self._exchange(
            [[*parts, *word]] * self._transport.size, [count * row + extra for count in self._rows_per_rank]
        )
        words = [raw[len(raw) - extra :] if r != self._rank else word[0] for r, raw in enumerate(received) if word]
        index_RK, weight_RK, x_RH = self._join([raw[: max(0, len(raw) - extra)] for raw in received], parts)
        mine_RK = self._mine(layer, words, index_RK)[self._source_R + index_RK]
        sums_RH = self._store.sums(layer, x_RH, mine_RK, weight_RK)
        partial = torch.split(sums_RH, list(self._rows_per_rank))
        own = partial[self._rank]
        back = self._exchange([[part] for part in partial], [own.nbytes] * self._transport.size)
        out_TH = own.to(_sum_dtype(x_TH))
        for rank, raw in enumerate(back):
            if rank != self._rank:
                out_TH += _view(raw, own)
        return out_TH[:tokens].to(x_TH.dtype)

    def _exchange(self, send: Sequence[Sequence[Tensor]], recv_bytes: Sequence[int]) -> list[Tensor]:
        """As Transport.all_to_all, also in a recording: then into memory that stays in place."""
        recorder = recording()
        if recorder is None:
            return self._transport.all_to_all(send, recv_bytes)
        sent = [[borrowed(tensor) for tensor in tensors] for tensors in send]
        device = self._routes_LE.device
        received = [
            torch.empty(0 if rank == self._rank else size, dtype=torch.uint8, device=device)
            for rank, size in enumerate(recv_bytes)
        ]
        places = [borrowed(raw) for raw in received]
        transport = self._transport

        def exchange() -> None:
            for place, raw in zip(places, transport.all_to_all(sent, recv_bytes), strict=True):
                if place.numel():
                    place.copy_(raw)

        recorder.outside(exchange)
        return received

    def _mine(self, layer: int, words: Sequence[Tensor], index_RK: Tensor) -> Tensor:
        """[W * (1 + E)] a layer's row of `_mine_LX`, for this step."""
        mine_X = self._mine_LX[layer]
        if self._choices and len(self._choices[layer].replicated):
            return self._mine_of_choice(self._choices[layer], index_RK)
        if self._dealer is None:
            return mine_X
        rank_E = self._dealer.ranks(layer, words, index_RK)
        [dealt] = np.nonzero(rank_E != NOBODY)
        if not len(dealt):
            return mine_X
        mine_WE = mine_X.view(self._transport.size, -1).clone()
        mine_WE[:, 1 + dealt] = torch.from_numpy(np.where(rank_E[dealt] == self._rank, dealt, ABSENT))
        return mine_WE.view(-1)

    def _mine_of_choice(self, choice: ReplicaChoice, index_RK: Tensor) -> Tensor:
        """The same where replicas are chosen by the step's own counts, which all workers know."""
        size = self._transport.size
        places = (self._source_R + index_RK).numpy().ravel()
        tokens_WE = np.bincount(places, minlength=self._mine_LX.shape[1]).reshape(size, -1)[:, 1:]
        ranks_WE = choice.ranks(tokens_WE)
        experts_E = np.arange(tokens_WE.shape[1])
        mine_WE = np.where(ranks_WE == self._rank, experts_E, ABSENT)
        return torch.from_numpy(np.pad(mine_WE, ((0, 0), (1, 0)), constant_values=ABSENT).ravel())

    def _forward_sparse(self, layer: int, index_TK: Tensor, weight_TK: Tensor, x_TH: Tensor) -> Tensor:
        rank_TK = self._routes_LE[layer][index_TK]
        rows: list[Tensor] = []
        send: list[tuple[Tensor, ...]] = []
        for rank in range(self._transport.size):
            here = rank_TK == rank
            chosen = here.any(1).nonzero().squeeze(1)
            rows.append(chosen)
            local = torch.where(here, index_TK, ABSENT)
            send.append(tuple(part.index_select(0, chosen) for part in (local, weight_TK, x_TH)))
        received = self._transport.all_to_all(send, None)
        row = row_bytes(x_TH.shape[1], index_TK.shape[1], x_TH.dtype)
        counts = [len(rows[self._rank]) if r == self._rank else raw.numel() // row for r, raw in enumerate(received)]
        index_RK, weight_RK, x_RH = self._join(received, send[self._rank])
        partial = torch.split(self._store.sums(layer, x_RH, index_RK, weight_RK), counts)
        own = partial[self._rank]
        # as many rows come back as were sent, so the sizes are known now
        size = own.shape[1] * own.dtype.itemsize
        back = self._transport.all_to_all([[part] for part in partial], [size * len(chosen) for chosen in rows])
        out_TH = torch.zeros(x_TH.shape, dtype=_sum_dtype(x_TH), device=x_TH.device)
        for rank, chosen in enumerate(rows):
            part = own if rank == self._rank else _view(back[rank], own)
            out_TH.index_add_(0, chosen, part.to(out_TH.dtype))
        return out_TH.to(x_TH.dtype)

    def _join(self, received: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Join all ranks' rows in rank order, so that one pass over them reads each expert's weights once."""
        top_k, hidden = own[0].shape[1], own[2]
        row = row_bytes(hidden.shape[1], top_k, hidden.dtype)
        parts: list[Sequence[Tensor]] = []
        for rank, raw in enumerate(received):
            if rank == self._rank:
                parts.append(own)
                continue
            head = raw.numel() // row * top_k * 4
            index, weight, x = torch.split(raw, [head, head, raw.numel() - 2 * head])
            parts.append(
                (index.view(torch.int32).view(-1, top_k), weight.view(torch.float32).view(-1, top_k), _view(x, hidden))
            )
        index_RK, weight_RK, x_RH = (torch.cat([part[i] for part in parts]) for i in range(3))
        # an exchange that a device does and that is aborted brings any bytes. Its results are refused later (`check`),
        # but an index beyond a table would end the device's context, and with it the process
        return index_RK.clamp_(ABSENT, self._routes_LE.shape[1] - 1), weight_RK, x_RH


def _sum_dtype(x_TH: Tensor) -> torch.dtype:
    """The dtype in which partial sums are added up."""
    return torch.float64 if x_TH.dtype == torch.float32 and x_TH.device.type == "cpu" else torch.float32


def _filled(part: Tensor, rows: int, value: float) -> Tensor:
    return part if len(part) == rows else F.pad(part, (0, 0, 0, rows - len(part)), value=value)


def _view(raw: Tensor, like: Tensor) -> Tensor:
    """View bytes as rows of `like`'s width and dtype."""
    return raw.view(like.dtype).view(-1, like.shape[1])


def row_bytes(hidden: int, top_k: int, dtype: torch.dtype) -> int:
    """The bytes that one token takes in a message: choices (int32), weights (float32), hidden state."""
    return top_k * 8 + hidden * dtype.itemsize
