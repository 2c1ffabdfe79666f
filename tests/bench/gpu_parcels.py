"""The part of gpu_migration.py that needs two processes: experts that stay on the GPU which both share."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from elastic_moe.model.shared_gpu.driver import CudaDevice
from elastic_moe.model.shared_gpu.memory import Device
from elastic_moe.model.shared_gpu.parcels import PLACES
from elastic_moe.model.worker.expert_sources import SharedGpu, from_copy, to_copy
from tests.model.fake_device import FakeDevice
from tests.model.gpu_pair import Pair, Place, tell

ANSWER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcels:
    bytes_per_s: float
    """Of rounds of PLACES experts that are sent, then taken, with two pipes between the processes."""
    export_s: float
    """Of one expert."""
    import_s: float


def serve(place: Place, nbytes: int) -> int:
    """Rank 0 sends as many experts as it is asked for, rank 1 takes what it is sent. Returns the number."""
    device: Device = CudaDevice() if place.device == "cuda" else FakeDevice()
    shared, count = SharedGpu.of(device), 0
    third = nbytes // 3 // 2
    expert = {
        name: torch.randn(n * third, device=place.torch_device).bfloat16() for name, n in (("up", 2), ("down", 1))
    }
    while (asked := place.pipe.recv()) is not None:
        begin = time.perf_counter()
        if place.rank == 0:
            copies = [to_copy(0, count + n, expert, shared) for n in range(asked)]
            assert all(copy.parcel is not None for copy in copies), "the GPU lends no memory; the log says why"
            tell(place, (copies, time.perf_counter() - begin))
            count += asked
        else:
            for copy in asked:
                from_copy(copy, place.torch_device, shared)
            tell(place, (len(asked), time.perf_counter() - begin))
            count += len(asked)
    if isinstance(device, FakeDevice):
        for address in list(device.owned):
            device.free(address)
    return count


def measure_parcels(device: str, nbytes: int, rounds: int = 40) -> Parcels:
    """Raises RuntimeError with what failed in a process, and TimeoutError."""
    with Pair(device, serve, nbytes) as pair:
        exported, imported, begin = 0.0, 0.0, 0.0
        for turn in range(-2, rounds):
            if turn == 0:
                exported, imported, begin = 0.0, 0.0, time.perf_counter()
            pair.pipes[0].send(PLACES)
            copies, took_s = pair.answer(0, ANSWER_S)
            exported += took_s
            pair.pipes[1].send(copies)
            _, took_s = pair.answer(1, ANSWER_S)
            imported += took_s
        whole_s, experts = time.perf_counter() - begin, rounds * PLACES
        for rank, pipe in enumerate(pair.pipes):
            pipe.send(None)
            assert pair.answer(rank, ANSWER_S) == experts + 2 * PLACES
    return Parcels(
        bytes_per_s=experts * nbytes / whole_s,
        export_s=exported / experts,
        import_s=imported / experts,
    )
