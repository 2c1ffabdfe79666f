"""Steps of one or several workers in lock-step, as processes without Ray: what expert parallelism gains or costs.

`python -m tests.bench.workers --model DIR --workers 1 2` prints the median milliseconds of a decode step for several
batch sizes (of all workers together), and of a prefill. All sets of workers are loaded at once and measured in turns,
so that a machine whose speed changes does not decide. Every process makes the plans of its own requests.

`--device-experts N...` gives every worker memory for N experts per layer, its cache area included; the others lie on
the disk, and their records are read past the page cache. Then it prints what was read as well. 0 stands for all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from elastic_moe.cluster import placement as placements
from elastic_moe.cluster.facts.tiering import pins_of
from elastic_moe.cluster.messages.epochs import (
    Epoch,
    EpochSpec,
    ModelInfo,
    ModelSpec,
    RoutingCounts,
    WindowRoom,
    WorkerSpec,
)
from elastic_moe.cluster.messages.requests import RequestId, SamplingParams
from elastic_moe.cluster.messages.steps import Chunk, NewSequence, StateUse, StepPlan, WindowBlocks
from elastic_moe.cluster.placement import Tier, Worker, WorkerId
from tests.model.lockstep import with_pinned

BLOCK = 16
LONGEST = 512
"""Tokens of a sequence, at most."""
EPOCH = Epoch(1)


def dtypes(form: str) -> dict[str, str]:
    """The settings of `int8` (experts in 8 bits) or `int4+int8` (experts in 4 bits, and the trunk in 8)."""
    experts, _, trunk = form.partition("+")
    return {"expert_dtype": experts, "trunk_dtype": trunk or "auto"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`requests` of all workers together, each with a prompt of `context` tokens."""

    requests: int
    context: int
    steps: int
    """Decode steps of a turn; 0: the prefill."""
    most_requests: int
    """Of all cases."""


class Load:
    """The plans of one worker's share of a case. Its sequences go on from turn to turn."""

    def __init__(
        self,
        case: Case,
        number: int,
        rank: int,
        size: int,
        vocabulary: int,
        windows: WindowRoom | None = None,
        num_cases: int = 1,
    ) -> None:
        """The `number`-th of `num_cases`. `windows`: the worker's blocks of layers with a sliding window, which all
        sequences share evenly."""
        self._shares = [case.requests // size + (r < case.requests % size) for r in range(size)]
        self._rank = rank
        self._context = case.context
        rng = random.Random(number * size + rank)
        share = self._shares[rank]
        self._prompts = [tuple(rng.randrange(vocabulary) for _ in range(case.context)) for _ in range(share)]
        self._ids = [RequestId(f"{number}-{n}") for n in range(share)]
        self._blocks = -(-max(LONGEST, case.context + case.steps) // BLOCK)
        self._windows = windows
        self._ring = 0 if windows is None else windows.blocks // (num_cases * case.most_requests)
        """Blocks of a sequence's window, which it uses in turn."""
        if windows is not None and self._ring * BLOCK < windows.tokens + case.context + BLOCK:
            raise ValueError(f"no room for windows of {windows.tokens} tokens of {case.requests} sequences")
        # no two cases share a block
        self._first_block = number * case.most_requests * self._blocks
        self._decoded = 0

    def prefill(self) -> StepPlan:
        """All prompts of this worker at once, as new sequences."""
        params = SamplingParams(max_tokens=LONGEST, temperature=0.0, ignore_eos=True)
        context = self._context
        self._decoded = 0
        return StepPlan(
            epoch=EPOCH,
            step=0,
            tokens_per_rank=tuple(share * context for share in self._shares),
            new=tuple(
                NewSequence(
                    request_id=name, token_ids=prompt, num_prompt_tokens=context, params=params, eos_token_ids=()
                )
                for name, prompt in zip(self._ids, self._prompts, strict=True)
            ),
            chunks=tuple(self._chunk(n, 0, context) for n in range(len(self._ids))),
            finished=tuple(self._ids),
        )

    def decode(self) -> StepPlan:
        """One more token of every sequence."""
        at = self._context + self._decoded
        self._decoded += 1
        chunks = tuple(self._chunk(n, at, 1) for n in range(len(self._ids)))
        return StepPlan(epoch=EPOCH, step=0, tokens_per_rank=tuple(self._shares), chunks=chunks)

    def _chunk(self, n: int, start: int, length: int) -> Chunk:
        first = self._first_block + n * self._blocks
        return Chunk(
            request_id=self._ids[n],
            start=start,
            length=length,
            known=start + length,
            block_offset=0,
            block_ids=tuple(range(first, first + self._blocks)),
            state=StateUse(keep_from=start),
            windows=self._window(n, start + length),
        )

    def _window(self, n: int, end: int) -> WindowBlocks | None:
        if self._windows is None:
            return None
        first = (self._first_block // self._blocks + n) * self._ring
        return WindowBlocks(first=0, ids=tuple(first + k % self._ring for k in range(-(-end // BLOCK))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Medians over the steps of a case on one worker, in seconds."""

    step_s: float
    waited_s: float
    """Of the step, waiting for peers (native exchange only)."""
    cpu_s: float
    """CPU time of a step, of all threads, on average."""
    read_bytes: float = 0.0
    """Read of experts in a step, on average."""
    stall_s: float = 0.0
    """Waited for experts in a step, on average."""
    missed: float = 0.0
    """Share of the active experts that were not in memory."""
    routing: RoutingCounts | None = None
    """Of the worker's own tokens."""


def measure(worker: Any, load: Load, case: Case, first: bool) -> Times:
    """One turn of a case."""
    from elastic_moe.model.native.exchange import NativeExchange

    group = worker._epoch.exchange
    times: list[tuple[float, float]] = []
    worker.tier_counts()
    worker.routing_counts()
    begin_cpu_s = time.process_time()

    def run(plan: StepPlan) -> None:
        begin = time.perf_counter()
        worker.step(plan)
        step_s = time.perf_counter() - begin
        waited = group.take_waited() if isinstance(group, NativeExchange) else None
        times.append((step_s, waited.tokens_s + waited.sums_s if waited else 0.0))

    if first or not case.steps:
        run(load.prefill())
    if case.steps:
        times.clear()
        worker.tier_counts()
        worker.routing_counts()
        begin_cpu_s = time.process_time()
        for _ in range(case.steps):
            run(load.decode())
    step_s, waited_s = (statistics.median(column) for column in zip(*times, strict=True))
    counts = worker.tier_counts()
    return Times(
        step_s=step_s,
        waited_s=waited_s,
        cpu_s=(time.process_time() - begin_cpu_s) / len(times),
        read_bytes=sum(counts.fetched_bytes.values()) / len(times),
        stall_s=sum(counts.stall_s.values()) / len(times),
        missed=counts.accesses[Tier.DISK] / max(1, sum(counts.accesses)),
        routing=worker.routing_counts(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One set of workers."""

    workers: int
    threads: int
    pinned: bool
    device_experts: int = 0
    """Experts per layer for which a worker has memory; 0: all of its experts."""
    read_ahead: bool = False
    cache_dir: str | None = None
    form: str = "auto"
    """Of the weights: see `dtypes`."""

    @property
    def _in(self) -> str:
        return "" if self.form == "auto" else f", {self.form}"

    def __str__(self) -> str:
        tiers = f", {self.device_experts} experts" if self.device_experts else ""
        ahead = ", read ahead" if self.read_ahead else ""
        return (
            f"{self.workers} x {self.threads} threads" + (", pinned" if self.pinned else "") + tiers + ahead + self._in
        )


def placed(info: ModelInfo, setup: Setup) -> placements.Placement:
    """The placement of a setup: where not everything fits, the first experts of each layer stay in memory."""
    size, experts = setup.workers, info.num_logical_experts
    members = tuple(
        Worker(id=WorkerId(f"w{r}"), node="n", slots=experts // size + (r < experts % size)) for r in range(size)
    )
    placement = placements.contiguous(info.num_layers, experts, members)
    return with_pinned(placement, pins_of(setup.device_experts)) if setup.device_experts else placement


def serve(path: str, setup: Setup, rank: int, group: str, cases: Sequence[Case], pipe: Connection) -> None:
    """One worker process: load, join, then run the cases whose numbers come through the pipe."""
    if setup.pinned:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[(rank * setup.threads + n) % len(cores)] for n in range(setup.threads)})
    from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
    from elastic_moe.model.tiers.area import Area
    from elastic_moe.model.worker.data_plane import DataPlane

    info, size = open_checkpoint(path).info, setup.workers
    placement = placed(info, setup)
    budget = None
    if setup.device_experts:
        budget = setup.device_experts * info.num_layers * info.expert_bytes
        Area.READ_AHEAD = setup.read_ahead
    worker = DataPlane(
        WorkerSpec(
            worker=placement.workers[rank].id,
            model=ModelSpec(path=path, dtype=info.dtype, device="cpu", max_model_len=LONGEST, **dtypes(setup.form)),
            experts=tuple(placement.resident(placement.workers[rank].id, layer) for layer in range(info.num_layers)),
            kv_cache_bytes=4 << 30,
            block_size=BLOCK,
            max_num_seqs=len(cases) * cases[0].most_requests,
            max_num_batched_tokens=max(case.requests * case.context for case in cases),
            num_threads=setup.threads,
            expert_memory_bytes=budget,
            expert_cache_dir=setup.cache_dir,
        )
    )
    worker.load()
    transport = "local" if size == 1 else "shm"
    worker.prepare(EpochSpec(epoch=EPOCH, placement=placement, group=group, transport=transport, rendezvous=""))
    worker.commit(EPOCH)
    pipe.send((worker.report.summary(), worker.loaded.disk_bytes_per_s))
    loads: dict[int, Load] = {}
    while (number := pipe.recv()) is not None:
        first = number not in loads
        if first:
            loads[number] = Load(
                cases[number], number, rank, size, info.vocab_size, worker.window_room, num_cases=len(cases)
            )
        pipe.send(measure(worker, loads[number], cases[number], first))


class Workers:
    """The processes of one setup."""

    def __init__(self, path: str, setup: Setup, cases: Sequence[Case]) -> None:
        context = multiprocessing.get_context("spawn")
        group = f"emoe-bench-{uuid.uuid4().hex[:8]}"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(setup.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(path, setup, rank, group, cases, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        told = [pipe.recv() for pipe in self._pipes]
        self.fit: str = told[-1][0]
        """Which code serves the model on one of them: all are alike."""
        self.disk_bytes_per_s: list[float] = [rate for _, rate in told]
        """As each worker has measured it when it loaded."""

    def run(self, number: int) -> Times:
        """The case of this number; of the slowest worker."""
        return max(self.run_all(number), key=lambda times: times.step_s)

    def run_all(self, number: int) -> list[Times]:
        """The same, of every worker."""
        for pipe in self._pipes:
            pipe.send(number)
        return [pipe.recv() for pipe in self._pipes]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="directory of the checkpoint")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="sets of workers to compare")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128, help="tokens before the first decode step")
    parser.add_argument("--steps", type=int, default=20, help="decode steps of one turn")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--prefill", type=int, default=8, help="prompts in the prefill's step; 0: no prefill")
    parser.add_argument(
        "--device-experts", type=int, nargs="+", default=[0], help="experts per layer and worker; 0: all"
    )
    parser.add_argument("--read-ahead", action="store_true", help="measure with and without reading ahead")
    parser.add_argument("--cache-dir", help="directory of the records; the default is the server's")
    parser.add_argument(
        "--forms", nargs="+", default=["auto"], help="of the experts' weights, and after a + of the trunk's: int4+int8"
    )
    parser.add_argument("--pin", action="store_true", help="measure every set pinned to cores as well")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    setups = [
        Setup(
            workers=n,
            threads=max(1, cores // n),
            pinned=pinned,
            device_experts=device_experts,
            read_ahead=ahead,
            cache_dir=args.cache_dir,
            form=form,
        )
        for form in args.forms
        for n in args.workers
        for pinned in ([False, True] if args.pin else [False])
        for device_experts in args.device_experts
        for ahead in ([False, True] if args.read_ahead and device_experts else [False])
    ]
    if args.context + args.steps * args.turns > LONGEST:
        parser.error(f"sequences would grow past {LONGEST} tokens")
    most = max(*args.batches, args.prefill)
    cases = [
        Case(requests=n, context=args.context, steps=steps, most_requests=most)
        for n, steps in [*((n, args.steps) for n in args.batches), *([(args.prefill, 0)] if args.prefill else [])]
    ]
    running = [Workers(args.model, setup, cases) for setup in setups]
    times: dict[tuple[int, int], list[Times]] = {}
    for _ in range(args.turns):
        for number in range(len(cases)):
            for n, workers in enumerate(running):
                times.setdefault((number, n), []).append(workers.run(number))
    for workers in running:
        workers.close()
    for workers, setup in zip(running, setups, strict=True):
        print(f"{setup} are served by: {workers.fit}")
    print("medians in ms: step (of which waiting); speed over the first set's")
    for number, case in enumerate(cases):
        for n, setup in enumerate(setups):
            seen, first = times[number, n], times[number, 0]
            step, waited = (
                1000 * statistics.median(getattr(turn, name) for turn in seen) for name in ("step_s", "waited_s")
            )
            cpu, read, stall, missed = (
                statistics.mean(getattr(turn, name) for turn in seen)
                for name in ("cpu_s", "read_bytes", "stall_s", "missed")
            )
            ratio = statistics.median(a.step_s / b.step_s for a, b in zip(first, seen, strict=True))
            kind = f"decode {case.requests:3}" if case.steps else f"prefill {case.requests * case.context}"
            tiers = f", {missed:.0%} missed, {read / 1e6:.1f} MB read, {1e3 * stall:.2f} ms stalled"
            told = f"  {1e3 * cpu:.2f} ms CPU" + (tiers if setup.device_experts else "")
            print(f"{kind:13} {setup!s:33} {step:8.2f} ({waited:6.2f})  {ratio:5.2f}{told}")


if __name__ == "__main__":
    main()
