"""ExpertHost: the actor around one worker's model. Only what Ray and the node add is here; see model/worker.py.

Methods of the concurrency group "step" run in one thread, one at a time; the others beside it in "io". torch is
imported when a host loads: whoever merely holds a handle imports this file too, and should not wait seconds for it.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import ray

from cluster.errors import NotReadyError
from cluster.protocol import Epoch, EpochSpec, ExpertCopy, HostInfo, HostSpec, RoutingCounts, StepPlan, StepResult

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from model.worker import Worker


class ExpertHost:
    """One GPU, or a share of a node's cores: the trunk, some experts, and the KV cache of the requests homed here."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._stores: list[TCPStore] = []

    @ray.method(concurrency_group="step")
    def load(self, spec: HostSpec) -> HostInfo:
        """Blocks until the weights are there. Raises UserError where they never will be."""
        import torch

        from model.worker import Worker

        begin = time.monotonic()
        worker = Worker(spec)
        self._worker = worker
        blocks, held_bytes = worker.load()
        return HostInfo(
            worker=spec.worker,
            node=ray.get_runtime_context().get_node_id(),
            address=_address(),
            pid=os.getpid(),
            device=torch.cuda.get_device_name() if spec.model.device == "cuda" else "cpu",
            num_kv_blocks=blocks,
            memory_bytes=held_bytes,
            load_s=time.monotonic() - begin,
        )

    @ray.method(concurrency_group="step")
    def step(self, plan: StepPlan) -> StepResult:
        return self._ready.step(plan)

    @ray.method(concurrency_group="step")
    def commit(self, epoch: Epoch) -> None:
        self._ready.commit(epoch)

    @ray.method(concurrency_group="step")
    def forget_sequences(self) -> None:
        self._ready.forget_sequences()

    @ray.method(concurrency_group="io")
    def load_progress(self) -> float:
        return 0.0 if self._worker is None else self._worker.progress

    @ray.method(concurrency_group="io")
    def rendezvous(self) -> str:
        """host:port of a store for one process group, kept as long as this host lives."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        address = _address()
        self._stores.append(TCPStore(address, 0, is_master=True, wait_for_workers=False))
        return f"{address}:{self._stores[-1].port}"

    @ray.method(concurrency_group="io")
    def prepare(self, spec: EpochSpec) -> None:
        self._ready.prepare(spec)

    @ray.method(concurrency_group="io")
    def abandon(self, epoch: Epoch) -> None:
        self._ready.abandon(epoch)

    @ray.method(concurrency_group="io")
    def export_expert(self, layer: int, expert: int) -> ExpertCopy:
        return self._ready.export_expert(layer, expert)

    @ray.method(concurrency_group="io")
    def import_expert(self, copy: ExpertCopy) -> None:
        self._ready.import_expert(copy)

    @ray.method(concurrency_group="io")
    def read_expert(self, layer: int, expert: int) -> None:
        self._ready.read_expert(layer, expert)

    @ray.method(concurrency_group="io")
    def routing_counts(self) -> RoutingCounts:
        return self._ready.routing_counts()

    @ray.method(concurrency_group="io")
    def abort_step(self) -> None:
        self._ready.abort_step()

    @ray.method(concurrency_group="io")
    def ping(self) -> None:
        """Answers as long as the process lives."""

    @property
    def _ready(self) -> Worker:
        if self._worker is None:
            raise NotReadyError("the host has not been told what to load")
        return self._worker


def _address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
