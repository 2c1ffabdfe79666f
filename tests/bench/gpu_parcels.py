"""The part of gpu_migration.py that needs two processes: experts that stay on the GPU which both share."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from elastic_moe.cluster.facts.transfers import BUNDLE_BYTES, bundles_at_once
from elastic_moe.model.shared_gpu.driver import CudaDevice
from elastic_moe.model.shared_gpu.memory import Device
from elastic_moe.model.worker.expert_sources import SharedGpu, from_copies, to_copies
from tests.model.fake_device import FakeDevice
from tests.model.gpu_pair import Pair, Place, tell

ANSWER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcels:
    bytes_per_s: float
    """Of bundles that are sent and taken, AT_ONCE_ON_GPUS at a time, with two pipes between the processes."""
    export_s: float
    """Of one bundle."""
    import_s: float


def serve(place: Place, nbytes: int) -> int:
    """Rank 0 sends as many bundles as it is asked for, rank 1 takes what it is sent. Returns the number of experts."""
    device: Device = CudaDevice() if place.device == "cuda" else FakeDevice()
    shared, count = SharedGpu.of(device), 0
    third, each = nbytes // 3 // 2, max(1, BUNDLE_BYTES // nbytes)
    expert = {
        name: torch.randn(n * third, device=place.torch_device).bfloat16() for name, n in (("up", 2), ("down", 1))
    }
    while (asked := place.pipe.recv()) is not None:
        begin = time.perf_counter()
        if place.rank == 0:
            bundles = []
            for _ in range(asked):
                numbers = range(count, count + each)
                bundles.append(to_copies(nullcontext({(0, n): expert for n in numbers}), place.torch_device, shared))
                count += each
            assert all(copy.parcel for copies in bundles for copy in copies), (
                "the GPU lends no memory; the log says why"
            )
            tell(place, (bundles, time.perf_counter() - begin))
        else:
            for copies in asked:
                count += len(from_copies(copies, place.torch_device, shared))
            tell(place, (len(asked), time.perf_counter() - begin))
    if isinstance(device, FakeDevice):
        for address in list(device.owned):
            device.free(address)
    return count


def measure_parcels(device: str, nbytes: int, rounds: int = 40) -> Parcels:
    """Raises RuntimeError with what failed in a process, and TimeoutError."""
    at_once, each = bundles_at_once(nbytes), max(1, BUNDLE_BYTES // nbytes)
    with Pair(device, serve, nbytes) as pair:
        exported, imported, begin = 0.0, 0.0, 0.0
        for turn in range(-2, rounds):
            if turn == 0:
                exported, imported, begin = 0.0, 0.0, time.perf_counter()
            pair.pipes[0].send(at_once)
            bundles, took_s = pair.answer(0, ANSWER_S)
            exported += took_s
            pair.pipes[1].send(bundles)
            _, took_s = pair.answer(1, ANSWER_S)
            imported += took_s
        whole_s, count = time.perf_counter() - begin, rounds * at_once
        for rank, pipe in enumerate(pair.pipes):
            pipe.send(None)
            assert pair.answer(rank, ANSWER_S) == (count + 2 * at_once) * each
    return Parcels(
        bytes_per_s=count * each * nbytes / whole_s,
        export_s=exported / count,
        import_s=imported / count,
    )
