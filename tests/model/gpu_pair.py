"""Two processes on one GPU: what they run, and how a test or a benchmark starts them.

`device` is "cuda", or "cpu" for tests/model/fake_device.py in the GPU's place, which tries the scripts out.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from torch import Tensor

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.cluster.placement import Placement, contiguous
from elastic_moe.model.exchange.device_joining import join_on_device
from elastic_moe.model.exchange.dispatch import TransportDispatcher
from elastic_moe.model.exchange.meeting import Meeting
from elastic_moe.model.exchange.tcp import TcpTransport
from elastic_moe.model.exchange.transports import Transport
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.fitting.fit import layer_experts
from elastic_moe.model.shared_gpu.driver import CudaDevice
from elastic_moe.model.shared_gpu.memory import Device
from elastic_moe.model.shared_gpu.transport import DeviceMemoryTransport
from tests.model.fake_device import FakeDevice
from tests.model.groups import ToyExperts, workers

NAMES = ("w0", "w1")
EXPERTS, HIDDEN, WIDTH, TOP_K = 6, 64, 32, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one of the two processes is."""

    rank: int
    group: str
    device: str
    pipe: Connection

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device("cpu")

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class Pair:
    """Runs `function(place, *arguments)` in two processes. `answer` returns what each sends or, last, returns."""

    def __init__(self, device: str, function: Callable[..., object], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        group = f"emoe-test-{uuid.uuid4().hex[:8]}"
        self.pipes: list[Connection] = []
        self.processes: list[SpawnProcess] = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(rank, group, device, theirs, function, arguments), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def answer(self, rank: int, timeout_s: float) -> Any:
        """Raises RuntimeError with the process's error, and TimeoutError."""
        if not wait([self.pipes[rank]], timeout_s):
            raise TimeoutError(f"process {rank} has not answered for {timeout_s:g} s")
        failed, value = self.pipes[rank].recv()
        if failed:
            raise RuntimeError(f"process {rank}: {value}")
        return value

    def swap_doors(self, timeout_s: float = 60) -> None:
        """Tell both where they meet for TCP."""
        doors = [self.answer(rank, timeout_s) for rank in range(2)]
        for pipe in self.pipes:
            pipe.send(doors)


def _run(
    rank: int, group: str, device: str, pipe: Connection, function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    place = Place(rank=rank, group=group, device=device, pipe=pipe)
    try:
        tell(place, function(place, *arguments))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
        raise


def tell(place: Place, value: object) -> None:
    place.pipe.send((False, value))


# --- Joining ------------------------------------------------------------------------------------------------------


def join_tcp(place: Place, timeout_s: float) -> TcpTransport:
    """The parent must call `swap_doors`."""
    meeting = Meeting("127.0.0.1")
    tell(place, meeting.endpoint)
    connections = meeting.join(place.rank, place.pipe.recv(), NAMES, timeout_s)
    return TcpTransport(rank=place.rank, connections=connections, names=NAMES, timeout_s=timeout_s)


def join_ipc(place: Place, max_bytes: int, timeout_s: float, name: str = "") -> DeviceMemoryTransport:
    device: Device = CudaDevice() if place.device == "cuda" else FakeDevice()
    transport = join_on_device(
        device, group=place.group + name, rank=place.rank, names=NAMES, max_bytes=max_bytes, timeout_s=timeout_s
    )
    assert transport is not None, "the processes could not share device memory; the log says why"
    return transport


# --- Tokens of a small model --------------------------------------------------------------------------------------


def choices(rank: int, tokens: int, turn: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(10 * turn + rank)
    drawn = [torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(tokens)]
    index = torch.stack(drawn) if drawn else torch.empty(0, TOP_K, dtype=torch.int64)
    return torch.randn(tokens, HIDDEN, generator=g), index, torch.rand(tokens, TOP_K, generator=g)


def placements() -> list[Placement]:
    """One after the other, with the same members: halves, others, one with a replica."""
    first = contiguous(1, EXPERTS, workers(3, 3))
    moved = Placement(
        num_logical_experts=EXPERTS,
        workers=workers(3, 3),
        physical_to_logical_map=[[5, 1, 3, 0, 2, 4]],  # type: ignore[arg-type]
    )
    copied = Placement(
        num_logical_experts=EXPERTS,
        workers=workers(4, 3),
        physical_to_logical_map=[[0, 1, 2, 3, 3, 4, 5]],  # type: ignore[arg-type]
    )
    return [first, moved, copied]


def compare(place: Place) -> int:
    """Several steps of each placement through device memory: exactly what TCP gives, and nearly what one worker does.

    Returns the number of steps. Raises AssertionError.
    """
    tcp = join_tcp(place, 60)
    ipc = join_ipc(place, 1 << 16, 60)
    module = ToyExperts(EXPERTS, HIDDEN, WIDTH, 0)
    oracle = ExpertStore([layer_experts(module)])
    for expert in range(EXPERTS):
        oracle.put(0, expert, module.weights[expert])
    steps = 0
    for placement in placements():
        store = _store(place, placement)
        for turn, tokens in enumerate([(5, 3), (1, 0), (0, 2), (40, 1), (7, 7)]):
            for host_waits in (False, True):
                ipc.host_waits = host_waits
                for most_dense in (0, 100):
                    drawn = choices(place.rank, tokens[place.rank], turn)
                    found = [
                        _step(place, placement, store, transport, tokens, drawn, most_dense) for transport in (ipc, tcp)
                    ]
                    assert torch.equal(*found), (placement, tokens, host_waits, most_dense)
                    want = oracle.forward(0, *drawn)
                    torch.testing.assert_close(found[0], want, rtol=1e-4, atol=1e-5)
                    steps += 1
    ipc.close()
    assert ipc.wait_freed(20), "the memory of the exchange is not free"
    return steps


def _store(place: Place, placement: Placement) -> ExpertStore:
    module = ToyExperts(EXPERTS, HIDDEN, WIDTH, 0).to(place.torch_device)
    store = ExpertStore([layer_experts(module)])
    for expert in placement.experts_of(placement.workers[place.rank].id, 0):
        store.put(0, expert, {name: t.to(place.torch_device) for name, t in module.weights[expert].items()})
    store.keep_only([store.held(0)])
    return store


def _step(
    place: Place,
    placement: Placement,
    store: ExpertStore,
    transport: Transport,
    tokens: tuple[int, int],
    drawn: tuple[Tensor, Tensor, Tensor],
    most_dense: int,
) -> Tensor:
    device = place.torch_device
    dispatcher = TransportDispatcher(placement, place.rank, store, transport, device=device, most_dense=most_dense)
    dispatcher.begin(tokens, None)
    out = dispatcher.forward(0, *(t.to(device) for t in drawn)).cpu()
    dispatcher.finish()
    return out


# --- A process that is killed -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Survived:
    """What a process saw whose peer was killed."""

    reason: str
    at_s: float
    """When, by the clock that all processes share."""
    freed: bool
    """Whether the exchange has freed its memory."""
    works: bool
    """Whether the device still computes."""
    released_bytes: int
    """Device memory that is free now and was not before the kill."""


def exchange_until_aborted(place: Place, timeout_s: float, deep: int) -> Survived:
    """Exchange `deep` messages between two looks at the result. Sends "ready" after some. A message of the parent's
    aborts the exchange, as the coordinator does."""
    transport = join_ipc(place, 1 << 20, timeout_s)
    threading.Thread(target=lambda: (place.pipe.recv(), transport.abort()), daemon=True).start()
    message = torch.ones(1 << 16, device=place.torch_device)
    rounds = before = 0
    try:
        while True:
            for _ in range(deep):
                transport.all_to_all([[message]] * 2, [message.nbytes] * 2)
            place.synchronize()
            transport.check()
            rounds += 1
            if rounds == 3:
                before = _free_bytes(place)
                tell(place, "ready")
    except StepAborted as error:
        reason, at_s = str(error), time.monotonic()
    transport.close()
    freed = transport.wait_freed(20)
    works = float((message @ message).item()) == len(message)
    released = _free_bytes(place) - before
    return Survived(reason=reason, at_s=at_s, freed=freed, works=works, released_bytes=released)


def _free_bytes(place: Place) -> int:
    return torch.cuda.mem_get_info()[0] if place.device == "cuda" else 0


def kill_one(device: str, *, timeout_s: float, told: bool, deep: int = 50) -> tuple[Survived, float]:
    """Kill one of two processes in the middle of its exchanges. `told`: the other is told so at once, by an abort.

    Returns what the other saw, and the seconds from the kill until it knew.
    """
    with Pair(device, exchange_until_aborted, timeout_s, deep) as pair:
        for rank in range(2):
            assert pair.answer(rank, 120) == "ready"
        time.sleep(0.3)
        pair.processes[1].kill()
        killed_s = time.monotonic()
        if told:
            pair.pipes[0].send("abort")
        survived = pair.answer(0, timeout_s + 60)
        assert isinstance(survived, Survived)
        return survived, survived.at_s - killed_s
