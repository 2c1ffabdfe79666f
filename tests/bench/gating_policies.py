"""How rivals bring tokens to their experts, re-implemented: the policy is theirs, the arithmetic is the same for all.

    StaticCapacity    GShard: every expert takes `factor` times the mean; padded below, dropped above. One-hot einsums
                      as published, or rows written to their places (`indexed`)
    AdaptiveCapacity  Tutel: the capacity is this step's busiest expert's load: nothing dropped, all padded to it
    ExactRows         FastMoE: sizes first, then exact rows, one for each choice of a token
                      MegaBlocks: the same exchange; rows of an expert padded to whole blocks, or a grouped product
    Dynamic           this project's dispatcher (model/exchange/dispatch.py): a token goes once to each worker, exact
                      sizes; with the native layer, or with the rivals' products, so that policies alone are compared

Not re-implemented: Tutel's choice of parallelism, FastMoE's shadowing, MegaBlocks' kernels. A rival's placement is
contiguous, as theirs is.

Legend: T tokens of this worker, H hidden, K experts per token, E experts, W workers, C capacity, S (token, choice).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec
from elastic_moe.cluster.placement import Worker, WorkerId, contiguous
from elastic_moe.model.exchange.dispatcher import LayerShape
from elastic_moe.model.exchange.join import join_exchange, make_dispatcher
from elastic_moe.model.exchange.transports import Transport
from elastic_moe.model.experts.cpu import CpuExperts
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.fitting.fit import layer_experts
from elastic_moe.model.trunk.linear import Weight, linear, pack

BLOCK = 128
"""MegaBlocks' rows per block."""


class Policy(Protocol):
    computed_rows: int
    """Rows that this worker's experts computed in the last call, padding and all."""
    dropped_rows: int
    """Choices of this worker's tokens that found no place."""

    def __call__(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The layer's weighted sum of experts: [T, H]. Every worker must call it."""
        ...


class GatedExperts(nn.Module):
    """Looks like transformers' expert modules to ExpertStore, and has the weights of all experts: gate, up and down."""

    is_transposed = False
    has_gate = True
    has_bias = False

    def __init__(self, experts: int, hidden: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.num_experts = experts
        self.gate_up: Tensor
        self.down: Tensor
        # buffers, since a module's dtype is read from them
        gate_up = torch.randn(experts, 2 * width, hidden, generator=g)
        down = torch.randn(experts, hidden, width, generator=g)
        self.register_buffer("gate_up", gate_up.div_(hidden**0.5).to(dtype))
        self.register_buffer("down", down.div_(width**0.5).to(dtype))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


Arithmetic = Callable[[Tensor, Sequence[int]], Tensor]
"""(rows [S, H] in consecutive groups, one for each expert of this worker; their sizes) -> [S, H]"""


def looped(module: GatedExperts, held: range) -> Arithmetic:
    """Expert by expert over packed weights, as ExpertStore does it in PyTorch."""
    gate_up = [pack(module.gate_up[e]) for e in held]
    down = [pack(module.down[e]) for e in held]

    def project(x_S: Tensor, weights: Sequence[Weight], counts: Sequence[int]) -> Tensor:
        parts = zip(torch.split(x_S, list(counts)), weights, strict=True)
        return torch.cat([linear(part, weight, None) for part, weight in parts if part.shape[0]])

    def run(x_SH: Tensor, counts: Sequence[int]) -> Tensor:
        if x_SH.shape[0] == 0:
            return x_SH
        return project(module._apply_gate(project(x_SH, gate_up, counts)), down, counts)

    return run


def grouped(module: GatedExperts, held: range) -> Arithmetic:
    """torch's grouped product over stacked plain weights."""
    gate_up, down = (w[held.start : held.stop].transpose(1, 2) for w in (module.gate_up, module.down))

    def run(x_SH: Tensor, counts: Sequence[int]) -> Tensor:
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        hidden = module._apply_gate(torch._grouped_mm(x_SH, gate_up, offs=ends))
        return torch._grouped_mm(hidden, down, offs=ends)

    return run


class StaticCapacity:
    """See the module."""

    def __init__(
        self, experts: int, transport: Transport, arithmetic: Arithmetic, *, factor: float, indexed: bool
    ) -> None:
        self._experts = experts
        self._transport = transport
        self._arithmetic = arithmetic
        self._factor = factor
        self._indexed = indexed
        self.computed_rows = self.dropped_rows = 0

    def __call__(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        capacity = self._capacity(index_TK)
        place_TK = _places(index_TK, self._experts)
        kept_TK = place_TK < capacity
        self.dropped_rows = kept_TK.numel() - int(kept_TK.sum())
        exchange = self._exchange_indexed if self._indexed else self._exchange_einsum
        return exchange(capacity, place_TK, kept_TK, x_TH, index_TK, weight_TK)

    def _capacity(self, index_TK: Tensor) -> int:
        return max(1, math.ceil(self._factor * index_TK.numel() / self._experts))

    def _exchange_indexed(
        self, capacity: int, place_TK: Tensor, kept_TK: Tensor, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        token_S, choice_S = kept_TK.nonzero(as_tuple=True)
        slot_S = index_TK[token_S, choice_S] * capacity + place_TK[token_S, choice_S]
        sent = x_TH.new_zeros(self._experts * capacity, x_TH.shape[1])
        sent[slot_S] = x_TH[token_S]
        y_SH = self._compute(sent.view(self._experts, capacity, -1)).flatten(0, 1)[slot_S]
        out_TH = torch.zeros(x_TH.shape, dtype=torch.float32)
        out_TH.index_add_(0, token_S, y_SH.float() * weight_TK[token_S, choice_S, None].float())
        return out_TH.to(x_TH.dtype)

    def _exchange_einsum(
        self, capacity: int, place_TK: Tensor, kept_TK: Tensor, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        expert_TKE = F.one_hot(index_TK, self._experts).to(x_TH.dtype) * kept_TK[..., None]
        place_TKC = F.one_hot(place_TK.clamp(max=capacity - 1), capacity).to(x_TH.dtype)
        combine_TEC = torch.einsum("tke,tkc->tec", expert_TKE * weight_TK[..., None].to(x_TH.dtype), place_TKC)
        dispatch_TEC = torch.einsum("tke,tkc->tec", expert_TKE, place_TKC)
        y_ECH = self._compute(torch.einsum("tec,th->ech", dispatch_TEC, x_TH))
        return torch.einsum("tec,ech->th", combine_TEC, y_ECH)

    def _compute(self, x_ECH: Tensor) -> Tensor:
        """Every worker's places for an expert go to its owner and come back."""
        transport, capacity = self._transport, x_ECH.shape[1]
        mine = self._experts // transport.size
        sent = x_ECH.contiguous().view(transport.size, mine, capacity, -1)
        rows_WECH = torch.stack(swap(transport, list(sent), [part.nbytes for part in sent]))
        rows_EH = rows_WECH.transpose(0, 1).flatten(0, 2)
        self.computed_rows = rows_EH.shape[0]
        y_EH = self._arithmetic(rows_EH, [transport.size * capacity] * mine)
        back = y_EH.view(mine, transport.size, capacity, -1).transpose(0, 1).contiguous()
        return torch.cat(swap(transport, list(back), [part.nbytes for part in back])).view_as(x_ECH)


class AdaptiveCapacity(StaticCapacity):
    """See the module. The capacity is agreed on by all workers first."""

    def __init__(self, experts: int, transport: Transport, arithmetic: Arithmetic) -> None:
        super().__init__(experts, transport, arithmetic, factor=0.0, indexed=True)

    def _capacity(self, index_TK: Tensor) -> int:
        busiest = torch.bincount(index_TK.flatten(), minlength=1).max()
        loads = swap(self._transport, [busiest.view(1)] * self._transport.size, [8] * self._transport.size)
        return max(1, int(torch.cat(loads).max()))


def _places(index_TK: Tensor, experts: int) -> Tensor:
    """[T, K] how many earlier choices want the same expert; all first choices come before all second ones."""
    flat = index_TK.t().flatten()
    counted = F.one_hot(flat, experts).cumsum(0)
    return (counted.gather(1, flat[:, None]) - 1).view(index_TK.shape[1], -1).t()


class ExactRows:
    """See the module. Every expert's rows are padded with zeros to whole blocks."""

    def __init__(self, experts: int, transport: Transport, arithmetic: Arithmetic, *, block: int = 1) -> None:
        self._experts = experts
        self._transport = transport
        self._arithmetic = arithmetic
        self._block = block
        self.computed_rows = self.dropped_rows = 0

    def __call__(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        flat = index_TK.flatten()
        order_S = flat.argsort(stable=True)
        counts_WE = torch.bincount(flat, minlength=self._experts).view(self._transport.size, -1)
        rows = torch.split(x_TH[order_S // index_TK.shape[1]], counts_WE.sum(1).tolist())
        y_SH = torch.cat(self._compute(list(rows), counts_WE))
        back = torch.empty_like(y_SH)
        back[order_S] = y_SH
        y_TKH = back.view(*index_TK.shape, -1)
        return (y_TKH.float() * weight_TK[..., None].float()).sum(1).to(x_TH.dtype)

    def _compute(self, rows: list[Tensor], counts_WE: Tensor) -> list[Tensor]:
        """[S, H] for each worker, sorted by its experts, there and back."""
        transport = self._transport
        counts = swap(transport, list(counts_WE), [counts_WE[0].nbytes] * transport.size)
        received_WE = torch.stack(counts)
        sizes = received_WE.sum(1)
        came = swap(transport, rows, (sizes * rows[0].shape[1] * rows[0].dtype.itemsize).tolist())
        # every sender's rows are sorted; over all senders they are not
        expert_S = torch.cat([torch.arange(len(c)).repeat_interleave(c) for c in received_WE])
        order_S = expert_S.argsort(stable=True)
        y_SH = self._padded(torch.cat(came)[order_S], received_WE.sum(0))
        back = torch.empty_like(y_SH)
        back[order_S] = y_SH
        sent = list(torch.split(back, sizes.tolist()))
        return swap(transport, sent, [part.nbytes for part in rows])

    def _padded(self, x_SH: Tensor, counts_E: Tensor) -> Tensor:
        padded_E = -(-counts_E // self._block) * self._block
        self.computed_rows = int(padded_E.sum())
        if self._block == 1:
            return self._arithmetic(x_SH, counts_E.tolist())
        # how far the padding of earlier experts shifts a row
        shift_E = (padded_E - counts_E).cumsum(0) - (padded_E - counts_E)
        target_S = torch.arange(x_SH.shape[0]) + shift_E.repeat_interleave(counts_E)
        buffer = x_SH.new_zeros(self.computed_rows, x_SH.shape[1])
        buffer[target_S] = x_SH
        return self._arithmetic(buffer, padded_E.tolist())[target_S]


def swap(transport: Transport, parts: Sequence[Tensor], recv_bytes: Sequence[int]) -> list[Tensor]:
    """parts[r] to rank r; what came from each rank, shaped [n, ...] as the own part is."""
    own = parts[transport.rank]
    came = transport.all_to_all([[part] for part in parts], list(recv_bytes))
    return [
        own if rank == transport.rank else raw.view(own.dtype).view(-1, *own.shape[1:]) for rank, raw in enumerate(came)
    ]


class Dynamic:
    """This project's dispatcher over its own store of experts, joined as workers of one node join."""

    def __init__(self, module: GatedExperts, member: Member, *, native: bool = True) -> None:
        """`native`: use the native library's layer if it is available; otherwise the products that rivals use."""
        size, each = member.transport.size, module.num_experts // member.transport.size
        workers = tuple(Worker(id=WorkerId(f"w{r}"), node="n", slots=each) for r in range(size))
        spec = EpochSpec(
            epoch=Epoch(1),
            placement=contiguous(1, module.num_experts, workers),
            transport="shm" if size > 1 else "local",
            group=f"{member.group}-dynamic",
            rendezvous="",
        )
        experts = layer_experts(module) if native else CpuExperts(module, "the benchmark asks for PyTorch's products")
        store = ExpertStore([experts])
        for expert in member.held(module.num_experts):
            store.put(0, expert, {"gate_up_proj": module.gate_up[expert], "down_proj": module.down[expert]})
        shape = LayerShape(hidden=module.down.shape[1], top_k=member.top_k, dtype=module.down.dtype)
        rank = member.transport.rank
        group = join_exchange(spec, rank, [shape], native=store.native, max_tokens=member.max_tokens, timeout_s=60.0)
        self._dispatcher = make_dispatcher(spec.placement, rank, store, group, torch.device("cpu"))
        self._size = size
        self.computed_rows = self.dropped_rows = 0

    def __call__(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        self.computed_rows = index_TK.numel()
        self._dispatcher.begin([x_TH.shape[0]] * self._size, None)
        return self._dispatcher.forward(0, x_TH, index_TK, weight_TK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One worker of a group."""

    transport: Transport
    group: str
    """Unique on the node, the same for all members."""
    top_k: int
    max_tokens: int
    """Most tokens of a worker."""

    def held(self, experts: int) -> range:
        """Raises ValueError where the experts cannot be shared out evenly."""
        if experts % self.transport.size:
            raise ValueError(f"{experts} experts cannot be shared out evenly to {self.transport.size} workers")
        each = experts // self.transport.size
        return range(self.transport.rank * each, (self.transport.rank + 1) * each)


Rival = Callable[[int, Transport, Arithmetic], Policy]

_RIVALS: dict[str, tuple[Rival, Callable[[GatedExperts, range], Arithmetic]]] = {
    "GShard, einsum, factor 2": (partial(StaticCapacity, factor=2.0, indexed=False), looped),
    "GShard, indexed, factor 2": (partial(StaticCapacity, factor=2.0, indexed=True), looped),
    "Tutel, adaptive capacity": (AdaptiveCapacity, looped),
    "FastMoE, exact rows": (ExactRows, looped),
    "MegaBlocks, blocks of 128": (partial(ExactRows, block=BLOCK), looped),
    "MegaBlocks, grouped product": (ExactRows, grouped),
}
OURS = "elastic-moe, dynamic"
OURS_ALIKE = f"{OURS}, the rivals' products"
POLICIES = (*_RIVALS, OURS, OURS_ALIKE)


def make_policy(name: str, module: GatedExperts, member: Member) -> Policy:
    """One of POLICIES."""
    held = member.held(module.num_experts)
    if name in (OURS, OURS_ALIKE):
        return Dynamic(module, member, native=name == OURS)
    rival, arithmetic = _RIVALS[name]
    return rival(module.num_experts, member.transport, arithmetic(module, held))
