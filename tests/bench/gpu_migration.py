"""How fast experts move between workers on GPUs, and what that does to steps: under three minutes on one GPU, no Ray.

    python -m tests.bench.gpu_migration [--model DIR] [--layers 4] [--streams 8] [--out DIR]

One worker answers so many streams with all experts of the checkpoint (a random Qwen3-MoE of 0.8 GB a layer, if none is
given). Meanwhile half of its experts are copied to a second set of stacks on the same GPU, as to another worker:
export, a copy through /dev/shm in the place of Ray's store, and import, in bundles, by as many threads as a worker
uses. Then the second set flips, between two steps, from its half to the experts that have come. In a server the two
ends are two processes, so that they have an interpreter each, and every bundle waits for two calls of Ray's besides.

Two more processes then send one another experts that stay on the GPU, as workers do that share one.

First come the ceilings, each of a copy of one expert: from the GPU to pinned memory, back, on the GPU, and by one core.
Goals (the project's own): 80 % of the slower of the first two, and no step longer than 1.5 times the usual one. Writes
gpu-migration.md.
"""

from __future__ import annotations

import argparse
import math
import mmap
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from elastic_moe.actors.worker.worker_actor import SWITCH_S
from elastic_moe.cluster.facts.transfers import BUNDLE_BYTES, bundles_at_once
from elastic_moe.cluster.messages.epochs import ExpertCopy
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.fitting.fit import layer_experts
from elastic_moe.model.worker.data_plane import DataPlane
from elastic_moe.model.worker.expert_sources import from_copies, from_copy
from tests.bench.gpu_parcels import Parcels, measure_parcels
from tests.bench.machine import where_and_when
from tests.bench.report import markdown
from tests.bench.wide import wide_checkpoint
from tests.model.lockstep import Lockstep, request
from tests.model.random_checkpoint import make_random_checkpoint

ON_GPU = "experts that stay on the GPU"
GOAL_SHARE, GOAL_STEP = 0.8, 1.5
WARM_STEPS, USUAL_STEPS = 20, 100
MOST_TOKENS = 4000
KV_BYTES = 2 << 30
Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Bytes per second of copies of one expert, and of its digest."""

    to_host: float
    to_device: float
    on_device: float
    by_core: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """A run of copies."""

    at_once: int
    bundle: int
    """Experts of a bundle."""
    bytes_per_s: float
    export_s: float
    """Of one bundle, as `store_s` and `import_s`, while the others run."""
    store_s: float
    import_s: float
    steps_s: Sequence[float]
    """Of the steps that ran meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flipped:
    experts: int
    launch_s: float
    """Until the CPU has launched it."""
    device_s: float
    """That copies of as many bytes take on the device."""
    release_s: float
    """To free what the experts lay in, which no step waits for."""
    step_s: float
    """Of the step behind it, from the beginning of the flip."""


class Bench:
    def __init__(self, path: Path, device: str, streams: int) -> None:
        self.device, self.store = torch.device(device), Store()
        self.cluster = Lockstep(
            path,
            [open_checkpoint(path).info.num_logical_experts],
            dtype="bfloat16",
            device=device,
            block_size=16,
            max_model_len=MOST_TOKENS + 200,
            max_num_seqs=streams,
            max_num_batched_tokens=2048,
            kv_cache_bytes=KV_BYTES if device == "cuda" else None,
            prefix_caching=False,
        )
        self.worker: DataPlane
        [self.worker] = self.cluster.workers.values()
        runner = self.worker._runner
        self.peer = ExpertStore([layer_experts(module) for module in expert_modules(runner._trunk)])
        layers, experts = self.cluster.info.num_layers, self.cluster.info.num_logical_experts
        self.first = [frozenset(range(experts // 2))] * layers
        self.then = [frozenset(range(experts // 2, experts))] * layers
        self.peer.reserve([experts // 2] * layers)
        pairs = self._pairs(self.first)
        for at in range(0, len(pairs), self.bundle):
            self._bring(pairs[at : at + self.bundle])
        self.peer.keep_only(self.first)
        for n in range(streams):
            prompt = [(7 * n + i) % 250 + 3 for i in range(128)]
            self.cluster.scheduler.add(request(f"r{n}", prompt, max_tokens=MOST_TOKENS))
        for _ in range(WARM_STEPS):
            self.step()

    @staticmethod
    def _pairs(rows: Sequence[frozenset[int]]) -> Pairs:
        return [(layer, expert) for layer, row in enumerate(rows) for expert in sorted(row)]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def expert_bytes(self) -> int:
        return self.worker.export_experts([(0, 0)])[0].nbytes

    @property
    def bundle(self) -> int:
        return max(1, BUNDLE_BYTES // self.expert_bytes)

    def step(self) -> float:
        """Seconds of one step."""
        begin = time.perf_counter()
        self.cluster.step()
        return time.perf_counter() - begin

    # --- Copies -------------------------------------------------------------------------------------------------

    def _bring(self, pairs: Pairs) -> tuple[float, float, float]:
        """Copy experts as a worker and its peer do. Seconds of the three parts."""
        times = [time.perf_counter()]
        copies = self.worker.export_experts(pairs)
        times.append(time.perf_counter())
        arrived = self.store.carry(copies)
        times.append(time.perf_counter())
        on_gpu = self.device.type == "cuda"
        found = from_copies(arrived, self.device) if on_gpu else [from_copy(copy) for copy in arrived]
        for pair, tensors in zip(pairs, found, strict=True):
            self.peer.put(*pair, tensors, borrowed=not on_gpu)
        times.append(time.perf_counter())
        return times[1] - times[0], times[2] - times[1], times[3] - times[2]

    def copy(self, pairs: Pairs, at_once: int, bundle: int) -> Copied:
        steps: list[float] = []
        with ThreadPoolExecutor(at_once) as pool:
            begin = time.perf_counter()
            running: list[Future[tuple[float, float, float]]] = [
                pool.submit(self._bring, pairs[at : at + bundle]) for at in range(0, len(pairs), bundle)
            ]
            while not all(future.done() for future in running):
                steps.append(self.step())
            wait(running)
            took_s = time.perf_counter() - begin
        parts = [statistics.mean(part) for part in zip(*(future.result() for future in running), strict=True)]
        return Copied(
            at_once=at_once,
            bundle=bundle,
            bytes_per_s=len(pairs) * self.expert_bytes / took_s,
            export_s=parts[0],
            store_s=parts[1],
            import_s=parts[2],
            steps_s=steps,
        )

    def flip(self, wanted: Sequence[frozenset[int]]) -> Flipped:
        self._synchronize()
        begin = time.perf_counter()
        self.peer.keep_only(wanted)
        launched = time.perf_counter()
        self.step()
        stepped = time.perf_counter()
        self._synchronize()
        release = time.perf_counter()
        self.peer.release()
        released = time.perf_counter()
        return Flipped(
            experts=sum(map(len, wanted)),
            launch_s=launched - begin,
            device_s=self._device_s(),
            release_s=released - release,
            step_s=stepped - begin,
        )

    def _device_s(self) -> float:
        """Of copies on the device of as many bytes as a flip writes."""
        rate = _rate(self.device, self.device, self.expert_bytes)
        return sum(map(len, self.then)) * self.expert_bytes / rate

    def run(self) -> tuple[list[float], list[Copied], list[Flipped]]:
        """Usual steps, the copies, and flips there, back and there again: the first one is what a device does the first
        time."""
        usual = [self.step() for _ in range(USUAL_STEPS)]
        pairs = self._pairs(self.then)
        found = []
        at_once = bundles_at_once(self.expert_bytes)
        for number, (threads, bundle) in enumerate(((1, 1), (1, self.bundle), (at_once, self.bundle))):
            if number:
                # forget them again
                self.peer.keep_only(self.first)
                self.peer.release()
            found.append(self.copy(pairs, threads, bundle))
        flips = [self.flip(self.then)]
        for wanted in (self.first, self.then):
            self.copy(self._pairs(wanted), at_once, self.bundle)
            flips.append(self.flip(wanted))
        return usual, found, flips


class Store(threading.local):
    """Memory of /dev/shm for one bundle of each thread, which is used again, as Ray's store does."""

    memory: mmap.mmap | None = None

    def carry(self, copies: Sequence[ExpertCopy]) -> list[ExpertCopy]:
        """The copies, their bytes where another process could map them. They are valid until the next call."""
        nbytes = sum(copy.nbytes for copy in copies)
        if self.memory is None or len(self.memory) < nbytes:
            with tempfile.TemporaryFile(dir="/dev/shm") as file:
                file.truncate(nbytes)
                self.memory = mmap.mmap(file.fileno(), nbytes)
        whole, at, carried = np.frombuffer(self.memory, np.uint8), 0, []
        for copy in copies:
            tensors = {}
            for name, raw in copy.tensors.items():
                tensors[name] = whole[at : at + len(raw)]
                tensors[name][:] = raw
                at += len(raw)
            carried.append(replace(copy, tensors=tensors))
        return carried


def ceilings(device: torch.device, nbytes: int) -> Ceilings:
    cpu = torch.device("cpu")
    return Ceilings(
        to_host=_rate(device, cpu, nbytes),
        to_device=_rate(cpu, device, nbytes),
        on_device=_rate(device, device, nbytes),
        by_core=_rate(cpu, cpu, nbytes),
    )


def _rate(source: torch.device, target: torch.device, nbytes: int) -> float:
    """Bytes per second of one copy after another, by the wall clock."""
    pins = "cuda" in (source.type, target.type)
    ends = [
        torch.empty(nbytes, dtype=torch.uint8, device=d, pin_memory=pins and d.type == "cpu") for d in (source, target)
    ]
    wait_all: Callable[[], object] = torch.cuda.synchronize if pins else (lambda: None)
    times = []
    for _ in range(12):
        wait_all()
        begin = time.perf_counter()
        ends[1].copy_(ends[0], non_blocking=True)
        wait_all()
        times.append(time.perf_counter() - begin)
    return nbytes / statistics.median(times[2:])


def report(
    top: Ceilings,
    nbytes: int,
    usual: Sequence[float],
    copies: Sequence[Copied],
    flips: Sequence[Flipped],
    parcels: Parcels | None,
) -> str:
    ceiling, usual_s = min(top.to_host, top.to_device), statistics.median(usual)
    rates = [
        ["to pinned memory", *_cells(top.to_host, ceiling)],
        ["from pinned memory", *_cells(top.to_device, ceiling)],
        ["on the device", *_cells(top.on_device, ceiling)],
        ["by one core of the host", *_cells(top.by_core, ceiling)],
        *([_name(c), *_cells(c.bytes_per_s, ceiling)] for c in copies),
        *([[ON_GPU, *_cells(parcels.bytes_per_s, ceiling)]] if parcels is not None else []),
    ]
    parts = [[_name(c), *(f"{1e3 * s:.4g}" for s in (c.export_s, c.store_s, c.import_s))] for c in copies]
    if parcels is not None:
        parts.append([ON_GPU, *(f"{1e3 * s:.4g}" for s in (parcels.export_s, 0.0, parcels.import_s))])
    steps = [_steps("usual", usual, usual_s)]
    steps += [_steps(_name(c), c.steps_s, usual_s) for c in copies if c.steps_s]
    flip = flips[-1]
    steps.append(_steps(f"flips of {flip.experts} experts before them", [f.step_s for f in flips], usual_s))
    share = copies[-1].bytes_per_s / ceiling
    longest = max([flip.step_s, *copies[-1].steps_s]) / usual_s
    verdict = [
        f"{share:.0%} of the copy rate (goal {GOAL_SHARE:.0%}), the longest step {longest:.2f} times the usual one "
        f"(goal {GOAL_STEP:g})",
        f"the last flip: {1e3 * flip.launch_s:.2f} ms of the CPU, {1e3 * flip.device_s:.2f} ms of the device at the "
        f"rate of its copies; {1e3 * flip.release_s:.2f} ms to free memory afterwards",
    ]
    return "\n\n".join(
        [
            markdown((f"copies of {nbytes / 1e6:.1f} MB", "MB/s", "of the ceiling"), rates),
            markdown(("a bundle", "export, ms", "store, ms", "import, ms"), parts),
            markdown(("steps", "median, ms", "99 %", "longest", "of the usual"), steps),
            *verdict,
        ]
    )


def _name(copied: Copied) -> str:
    return f"bundles of {copied.bundle}, {copied.at_once} at a time"


def _cells(rate: float, ceiling: float) -> list[str]:
    return [f"{rate / 1e6:.4g}", f"{rate / ceiling:.0%}"]


def _steps(name: str, seconds: Sequence[float], usual_s: float) -> list[str]:
    ordered = sorted(seconds)
    figures = statistics.median(ordered), ordered[math.ceil(0.99 * (len(ordered) - 1))], ordered[-1]
    return [name, *(f"{1e3 * s:.4g}" for s in figures), f"{figures[-1] / usual_s:.2f}"]


def checkpoint(where: Path, device: str, layers: int) -> Path:
    if device == "cuda":
        return wide_checkpoint(where / "wide", layers=layers)
    return make_random_checkpoint(where / "small", "qwen3_moe", layers=layers, experts=8, dtype="bfloat16")


def measure(model: Path | None, device: str, layers: int, streams: int) -> str:
    # as in a worker (actors/worker/worker_actor.py)
    sys.setswitchinterval(SWITCH_S)
    with tempfile.TemporaryDirectory() as where:
        bench = Bench(model or checkpoint(Path(where), device, layers), device, streams)
        print(f"served by: {bench.worker.report.summary()}", flush=True)
        nbytes = bench.expert_bytes
        top = ceilings(bench.device, nbytes)
        usual, copies, flips = bench.run()
        try:
            parcels = measure_parcels(device, nbytes)
        except (RuntimeError, TimeoutError) as error:
            print(f"experts do not stay on the GPU: {error}", flush=True)
            parcels = None
        return report(top, nbytes, usual, copies, flips, parcels)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu tries the script, its figures mean nothing")
    parser.add_argument("--model", type=Path, help="directory of a checkpoint in bfloat16")
    parser.add_argument("--layers", type=int, default=4, help="of the random checkpoint")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU and a torch built for it; there is none here", file=sys.stderr)
        return 2
    text = measure(args.model, args.device, args.layers, args.streams)
    about = where_and_when() | {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
    args.out.mkdir(parents=True, exist_ok=True)
    whole = "; ".join(f"{name} {value}" for name, value in about.items()) + "\n\n" + text + "\n"
    (args.out / "gpu-migration.md").write_text(whole)
    print(whole, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
