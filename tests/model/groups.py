"""Runs lock-step workers as threads of one process, for fast tests: each runs the same function with its own rank."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

from elastic_moe.cluster.placement import EMPTY, Placement, Worker, WorkerId, contiguous
from elastic_moe.model.exchange.device_joining import join_on_device
from elastic_moe.model.exchange.meeting import Meeting
from elastic_moe.model.exchange.shared_memory import SharedMemoryTransport
from elastic_moe.model.exchange.tcp import TcpTransport
from elastic_moe.model.exchange.transports import LocalTransport, Transport
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.fitting.fit import layer_experts
from elastic_moe.model.shared_gpu.memory import Device
from elastic_moe.model.shared_gpu.transport import DeviceMemoryTransport
from tests.model.fake_device import FakeDevice

R = TypeVar("R")


def workers(*slots: int) -> tuple[Worker, ...]:
    return tuple(Worker(id=WorkerId(f"w{i}"), node="n", slots=n) for i, n in enumerate(slots))


def run_group(size: int, function: Callable[[int], R]) -> list[R]:
    """Call `function(rank)` in `size` threads at once; results by rank. The first error is raised."""
    barrier = threading.Barrier(size)

    def call(rank: int) -> R:
        torch.set_num_threads(1)
        barrier.wait()
        return function(rank)

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(call, rank) for rank in range(size)]]


def make_transports(kind: str, size: int, *, max_bytes: int = 1 << 20, timeout_s: float = 20.0) -> list[Transport]:
    """One per rank, joined. `kind`: local, shm, tcp, or gpu, which is a fake one that all share."""
    group = f"emoe-test-{uuid.uuid4().hex[:8]}"
    if kind == "local":
        return [LocalTransport()]
    if kind == "shm":
        return run_group(
            size,
            lambda rank: SharedMemoryTransport(
                group=group, rank=rank, size=size, max_bytes=max_bytes, timeout_s=timeout_s
            ),
        )
    if kind == "gpu":
        return list(join_by_gpu([FakeDevice() for _ in range(size)], max_bytes=max_bytes, timeout_s=timeout_s))
    return list(join_by_tcp(size, timeout_s))


def join_by_gpu(
    devices: Sequence[Device], *, max_bytes: int = 1 << 16, timeout_s: float = 20.0
) -> list[DeviceMemoryTransport]:
    """One per rank, joined. Each rank has its own view of one GPU."""
    joined = try_by_gpu(devices, max_bytes=max_bytes, timeout_s=timeout_s)
    transports = [transport for transport in joined if transport is not None]
    assert len(transports) == len(devices)
    return transports


def try_by_gpu(
    devices: Sequence[Device], *, max_bytes: int = 1 << 16, timeout_s: float = 20.0
) -> list[DeviceMemoryTransport | None]:
    """One per rank, or None for each."""
    group, names = f"emoe-test-{uuid.uuid4().hex[:8]}", [f"w{rank}" for rank in range(len(devices))]

    def join(rank: int) -> DeviceMemoryTransport | None:
        return join_on_device(
            devices[rank], group=group, rank=rank, names=names, max_bytes=max_bytes, timeout_s=timeout_s
        )

    return run_group(len(devices), join)


def join_by_tcp(size: int, timeout_s: float = 20.0) -> list[TcpTransport]:
    """One per rank, joined."""
    meetings = [Meeting("127.0.0.1") for _ in range(size)]
    doors, names = [meeting.endpoint for meeting in meetings], [f"w{rank}" for rank in range(size)]

    def join(rank: int) -> TcpTransport:
        connections = meetings[rank].join(rank, doors, names, timeout_s)
        return TcpTransport(rank=rank, connections=connections, names=names, timeout_s=timeout_s)

    return run_group(size, join)


class ToyExperts(nn.Module):
    """Looks like transformers' decorated expert modules; its random weights are kept apart."""

    is_transposed = False
    has_gate = True
    has_bias = False

    def __init__(self, experts: int, hidden: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_experts = experts
        self.register_buffer("like", torch.empty(0, dtype=dtype))
        g = torch.Generator().manual_seed(seed)
        drawn = [
            {
                "gate_up_proj": torch.randn(2 * width, hidden, generator=g) / hidden**0.5,
                "down_proj": torch.randn(hidden, width, generator=g) / width**0.5,
            }
            for _ in range(experts)
        ]
        self.weights = [{name: t.to(dtype) for name, t in expert.items()} for expert in drawn]

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


def toy_store(modules: Sequence[ToyExperts], placement: Placement, rank: int) -> ExpertStore:
    """The store of worker `rank` of `placement`, with its experts."""
    store = ExpertStore([layer_experts(module) for module in modules])
    for layer, module in enumerate(modules):
        for expert in placement.experts_of(placement.workers[rank].id, layer):
            if expert != EMPTY:
                store.put(layer, expert, module.weights[expert])
    return store


def one_worker(layers: int, experts: int) -> Placement:
    return contiguous(layers, experts, workers(experts))
