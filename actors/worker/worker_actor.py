"""WorkerActor: the actor around one worker's data plane (model/worker/data_plane.py). Only what Ray needs is here.

Ray's calls are for the control plane; they run side by side in the concurrency group "io". Joining other workers and
copying experts have groups of their own: a join may hang for long and must not keep a ping waiting, and the threads of
copies have a low priority. Steps and epochs come from the engine, in order, over a connection of
its own (actors/worker/step_server.py). torch is imported when a worker loads its model: processes that only call the
actor import this file too, and should not wait seconds for torch.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np
import ray

from elastic_moe.actors.forkserver.imports import import_model
from elastic_moe.actors.forkserver.origin import origin
from elastic_moe.actors.liveness import STEP_PING_S
from elastic_moe.actors.logs import LogSettings, set_up
from elastic_moe.actors.remote.addresses import node_address
from elastic_moe.actors.remote.ask import in_group
from elastic_moe.actors.remote.codec import is_exhausted
from elastic_moe.cluster.errors import NotReadyError
from elastic_moe.cluster.facts.routing import joined
from elastic_moe.cluster.messages.epochs import (
    Epoch,
    EpochSpec,
    ExpertCopy,
    NodeReport,
    WorkerInfo,
    WorkerSpec,
)
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.placement import WorkerId

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from elastic_moe.actors.worker.step_server import StepServer
    from elastic_moe.model.worker.data_plane import DataPlane

logger = logging.getLogger(__name__)

COPY_NICENESS = 10
WARM_UP_NICENESS = 5
KEPT_STORES = 8
SWITCH_S = 0.0005
"""Seconds for which a thread of a worker on a GPU keeps Python's interpreter while another waits for it. A step there
is launched from Python, and at Python's own 5 ms a copy would hold it up by half a step."""


class WorkerActor:
    """One GPU, or a share of a node's cores: the trunk, some experts, and the KV cache of the requests homed here."""

    def __init__(self, name: str = "worker", logs: LogSettings | None = None) -> None:
        """`logs`: where this process's log lines go, under `name`; left as it is if not given."""
        if logs is not None:
            set_up(name, logs)
        _log_origin()
        self._worker: DataPlane | None = None
        self._steps: StepServer | None = None
        self._loading = threading.Lock()
        self._info: WorkerInfo | None = None
        self._address = ""
        """Where its listeners are; known when it loads."""
        self._stores: list[TCPStore] = []
        self._rng = np.random.default_rng(0)

    @in_group("io")
    def warm_up(self) -> int:
        """Import what loading needs, which is most of the time until a small model serves. Returns the process id."""

        def give_way_and_import() -> None:
            _give_way(WARM_UP_NICENESS)
            import_model()

        # a thread that will do nothing else
        importing = threading.Thread(target=give_way_and_import)
        importing.start()
        importing.join()
        return os.getpid()

    @in_group("io")
    def load(self, spec: WorkerSpec) -> WorkerInfo:
        """Blocks until the weights are loaded. Later calls return the same. Raises UserError if loading never works."""
        with self._loading:
            if self._info is None:
                self._info = self._load(spec)
            return self._info

    def _load(self, spec: WorkerSpec) -> WorkerInfo:
        import_model()
        import torch

        from elastic_moe.actors.worker.step_server import StepServer
        from elastic_moe.model.worker.data_plane import DataPlane

        if spec.model.device == "cuda":
            sys.setswitchinterval(SWITCH_S)
        self._address = node_address(spec.interface)
        worker = DataPlane(spec)
        self._worker = worker
        blocks, held_bytes = worker.load()
        loaded, rates = worker.loaded, worker.loaded.host.rates
        self._steps = StepServer(worker, self._address)
        return WorkerInfo(
            worker=spec.worker,
            node=ray.get_runtime_context().get_node_id(),
            endpoint=self._steps.endpoint,
            pid=os.getpid(),
            device=torch.cuda.get_device_name() if spec.model.device == "cuda" else "cpu",
            num_kv_blocks=blocks,
            memory_bytes=held_bytes,
            state_room=loaded.state_room,
            window_room=loaded.window_room,
            expert_capacity=loaded.capacity,
            held=worker.held(),
            host_capacity=loaded.host.capacity,
            disk_bytes_per_s=loaded.disk_bytes_per_s,
            host_bytes_per_s=None if rates is None else rates.bytes_per_s,
            host_token_s=None if rates is None else rates.token_s,
            fit=loaded.report,
            gpu=str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            if spec.model.device == "cuda"
            else None,
        )

    @in_group("io")
    def load_progress(self) -> float:
        return 0.0 if self._worker is None else self._worker.progress

    @in_group("io")
    def rendezvous(self) -> str:
        """host:port of a store for one process group, kept until there are some newer ones."""
        from elastic_moe.model.exchange.transports import open_store

        self._stores.append(open_store(self._address))
        # of the group in force and of attempts at the next; older groups are gone
        del self._stores[:-KEPT_STORES]
        return f"{self._address}:{self._stores[-1].port}"

    @in_group("io")
    def open_door(self) -> Endpoint:
        """Where this worker waits for the others of one group."""
        return self._ready.open_door(self._address)

    @in_group("joins")
    def prepare(self, spec: EpochSpec) -> None:
        try:
            self._ready.prepare(spec)
        except OSError as error:
            if is_exhausted(error):
                # nothing frees them but the end of the process, and another takes its place
                logger.critical("a group cannot be joined, this process ends: %s", error)
                os._exit(1)
            raise

    @in_group("io")
    def abandon(self, epoch: Epoch) -> None:
        self._ready.abandon(epoch)

    @in_group("copies")
    def export_experts(self, pairs: list[tuple[int, int]], target: WorkerId) -> list[ExpertCopy]:
        _give_way()
        return self._ready.export_experts(pairs, target)

    @in_group("copies")
    def import_experts(self, copies: list[ExpertCopy]) -> None:
        _give_way()
        self._ready.import_experts(copies)

    @in_group("io")
    def read_experts(self, pairs: list[tuple[int, int]]) -> None:
        self._ready.read_experts(pairs)

    @in_group("io")
    def report(self, others: NodeReport | None = None) -> NodeReport:
        """What this worker did since its previous report, and, if given, what others of its node did."""
        plane, name = self._ready, self._ready.spec.worker
        own = NodeReport(
            counts=plane.routing_counts(),
            tiers={name: plane.tier_counts()},
            link_gbps={name: plane.link_gbps()},
        )
        return own if others is None else joined(others, own, self._rng)

    @in_group("io")
    def abort_step(self, epoch: Epoch) -> None:
        self._ready.abort_step(epoch)

    @in_group("io")
    def ping(self) -> None:
        """Answers as long as the process lives."""

    @in_group("io")
    def ping_step(self) -> None:
        """Answers as soon as the thread of the steps is free. Raises TimeoutError where it hangs."""
        if self._steps is not None and not self._steps.free.wait(STEP_PING_S):
            raise TimeoutError("a step hangs")

    @property
    def _ready(self) -> DataPlane:
        if self._worker is None:
            raise NotReadyError("the worker has no model yet: `load` has not been called")
        return self._worker


def _log_origin() -> None:
    if (found := origin(os.environ)) is not None:
        said, forked = found
        logger.log(logging.INFO if forked else logging.WARNING, "process %d was %s", os.getpid(), said)


def _give_way(niceness: int = COPY_NICENESS) -> None:
    """From now on this thread takes a core only where the steps leave one: they run in lock-step, so a step that loses
    its core for a while holds up every worker."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
