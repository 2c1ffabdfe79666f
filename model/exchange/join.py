"""Joins the workers of an epoch: chooses how they exchange tokens, and makes the dispatcher for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elastic_moe.cluster.messages.epochs import EpochSpec
from elastic_moe.cluster.placement import Placement
from elastic_moe.model.exchange.dealing import Memory, word_bytes
from elastic_moe.model.exchange.device_joining import join_on_device
from elastic_moe.model.exchange.dispatch import TransportDispatcher, row_bytes
from elastic_moe.model.exchange.dispatcher import Dispatcher, LayerShape
from elastic_moe.model.exchange.meeting import Meeting
from elastic_moe.model.exchange.native_dispatch import NativeDispatcher
from elastic_moe.model.exchange.rates import measure
from elastic_moe.model.exchange.shared_memory import SharedMemoryTransport
from elastic_moe.model.exchange.tcp import TcpTransport
from elastic_moe.model.exchange.transports import LocalTransport, NcclTransport, Transport
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.graph_pieces import padded
from elastic_moe.model.native import library
from elastic_moe.model.native.exchange import NativeExchange
from elastic_moe.model.native.segments import remove_stale
from elastic_moe.model.shared_gpu.driver import CudaDevice

Exchange = Transport | NativeExchange
"""How workers in lock-step exchange tokens: bytes through a transport, or natively within a node."""


def join_exchange(
    spec: EpochSpec,
    rank: int,
    shapes: Sequence[LayerShape],
    *,
    native: bool,
    max_tokens: int,
    timeout_s: float,
    meeting: Meeting | None = None,
) -> Exchange:
    """Join the workers of `spec`. Blocks until all have joined. `max_tokens` is the most that a worker runs in a step.

    `native` says that this worker can exchange tokens natively. The native exchange is used if all workers can.
    `meeting` is this worker's door of `spec.doors`.

    Raises StepAborted if a worker does not join within `timeout_s`.
    """
    # the workers that were killed while they joined the group before this one, and any others
    remove_stale()
    size = len(spec.placement.workers)
    if spec.transport == "local":
        return LocalTransport()
    names = [worker.id for worker in spec.placement.workers]
    if spec.transport == "ipc":
        exchange = join_on_device(
            CudaDevice(),
            group=spec.group,
            rank=rank,
            names=names,
            max_bytes=_message_bytes(spec, shapes, max_tokens),
            timeout_s=timeout_s,
        )
        if exchange is not None:
            return exchange
    if spec.transport in ("tcp", "ipc"):
        assert meeting is not None
        connections = meeting.join(rank, spec.doors, names, timeout_s)
        transport = TcpTransport(rank=rank, connections=connections, names=names, timeout_s=timeout_s)
        measure(transport)
        return transport
    if spec.transport == "nccl":
        return NcclTransport(rendezvous=spec.rendezvous, group=spec.group, rank=rank, size=size, timeout_s=timeout_s)
    lib = library()
    able = lib is not None and native
    if _all_able(able, group=f"{spec.group}-able", rank=rank, size=size, timeout_s=timeout_s):
        assert lib is not None
        return NativeExchange(
            lib,
            group=spec.group,
            rank=rank,
            size=size,
            hidden=shapes[0].hidden,
            top_k=shapes[0].top_k,
            max_tokens=max_tokens,
            timeout_s=timeout_s,
            one_round=not spec.placement.all_resident,
        )
    return SharedMemoryTransport(
        group=spec.group, rank=rank, size=size, max_bytes=_message_bytes(spec, shapes, max_tokens), timeout_s=timeout_s
    )


def _message_bytes(spec: EpochSpec, shapes: Sequence[LayerShape], max_tokens: int) -> int:
    """The most bytes that one worker sends another at a time."""
    # sums of tokens in float32 come back in float64
    row = max(max(row_bytes(s.hidden, s.top_k, s.dtype), 2 * s.hidden * s.dtype.itemsize) for s in shapes)
    # workers of GPUs pad their tokens
    return row * padded(max_tokens) + word_bytes(spec.placement.num_logical_experts)


def make_dispatcher(
    placement: Placement,
    rank: int,
    store: ExpertStore,
    exchange: Exchange,
    device: torch.device,
    memory: Memory | None = None,
) -> Dispatcher:
    """Make the dispatcher of one epoch. The exchange may serve several epochs, one after the other. `memory`: what this
    worker has in memory, where experts may lie on disks."""
    if isinstance(exchange, NativeExchange):
        return NativeDispatcher(placement, rank, store, exchange)
    gbps = exchange.slowest_gbps if isinstance(exchange, TcpTransport) else None
    return TransportDispatcher(placement, rank, store, exchange, device=device, slowest_gbps=gbps, memory=memory)


def _all_able(able: bool, *, group: str, rank: int, size: int, timeout_s: float) -> bool:
    """Whether every rank is `able`, since all must use the same exchange. Blocks until all ranks have answered."""
    small = SharedMemoryTransport(group=group, rank=rank, size=size, max_bytes=8, timeout_s=timeout_s)
    answer = torch.tensor([able], dtype=torch.uint8)
    said = small.all_to_all([[answer]] * size, [1] * size)
    return able and all(bool(raw.item()) for peer, raw in enumerate(said) if peer != rank)
