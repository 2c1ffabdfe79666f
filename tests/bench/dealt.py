"""Measured decode steps of real routing: plans with tiers, and misses that are dealt among the workers in each step.

    python -m tests.bench.dealt tests/optimizer/traces/*.npz --device-experts 4 8 --requests 8

Workers of several nodes (processes here, which exchange tokens by TCP) run a small model with as many layers and
experts as the trace; the router's choices are replaced by those of the trace. Every worker's disk takes `--fetch-ms`
for an expert, whatever the real one does, and reads one at a time. Placements are planned on the first half of the
requests, and the second half is run. Prints the mean milliseconds of a step, of sets of workers in turns, and how many
fetches the layers of a step wait for: those of the worker with the most in each layer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.facts.tiering import cache_slots_of
from elastic_moe.cluster.messages.epochs import EpochSpec, ModelSpec, WorkerSpec
from elastic_moe.cluster.placement import Placement
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.residency.memory import WorkerMemory
from elastic_moe.optimizer.study.scenario import make_workers, problem_from_trace
from elastic_moe.optimizer.study.steps import decoding_steps
from elastic_moe.optimizer.study.traces import Trace, load_trace
from tests.bench.machine import where_and_when
from tests.bench.workers import BLOCK, EPOCH, LONGEST, Case, Load
from tests.model.random_checkpoint import make_random_checkpoint

CONTEXT = 4
_WARM_UP = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One set of workers."""

    placement: Placement
    dealt: bool
    device_experts: int
    """For each layer and worker."""
    fetch_s: float
    choices: npt.NDArray[np.int64]
    """[steps, requests, layers, top_k] experts that the router chooses in each decode step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of one worker."""

    step_s: float
    fetches: npt.NDArray[np.int64]
    """[L]"""


def _slow_disk(fetch_s: float, seen: list[int]) -> None:
    """Make the disk slow, and append the layer of every fetch to `seen`."""
    from elastic_moe.model.tiers.disk import Disk

    read, turn = Disk.read, threading.Lock()

    def slow(self: Disk, layer: int, expert: int, slot: Any) -> Any:
        seen.append(layer)
        with turn:
            end = time.perf_counter() + fetch_s
            source = read(self, layer, expert, slot)
            time.sleep(max(0.0, end - time.perf_counter()))
        return source

    Disk.read = slow  # type: ignore[method-assign]


def serve(path: str, cache: str, setup: Setup, rank: int, case: Case, pipe: Connection) -> None:
    """One worker process."""
    import torch

    from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
    from elastic_moe.model.exchange import join
    from elastic_moe.model.worker import data_plane

    fetches: list[int] = []
    _slow_disk(setup.fetch_s, fetches)
    if not setup.dealt:
        make = join.make_dispatcher
        data_plane.make_dispatcher = lambda *parts: make(*parts[:5])
    placement, info = setup.placement, open_checkpoint(path).info
    worker = data_plane.DataPlane(
        WorkerSpec(
            worker=placement.workers[rank].id,
            model=ModelSpec(path=path, dtype=info.dtype, device="cpu", max_model_len=LONGEST),
            experts=tuple(placement.resident(placement.workers[rank].id, layer) for layer in range(info.num_layers)),
            kv_cache_bytes=64 << 20,
            block_size=BLOCK,
            max_num_seqs=case.requests,
            max_num_batched_tokens=case.requests * CONTEXT,
            num_threads=1,
            expert_memory_bytes=setup.device_experts * info.num_layers * info.expert_bytes,
            expert_cache_dir=cache,
        )
    )
    worker.load()
    pipe.send(worker.open_door("127.0.0.1"))
    doors = pipe.recv()
    worker.prepare(
        EpochSpec(epoch=EPOCH, placement=placement, group="dealt", transport="tcp", rendezvous="", doors=doors)
    )
    worker.commit(EPOCH)
    load = Load(case, 0, rank, len(placement.workers), info.vocab_size)
    shares = load.prefill().tokens_per_rank
    first = sum(shares[:rank]) // CONTEXT
    mine = torch.from_numpy(setup.choices[:, first : first + shares[rank] // CONTEXT])
    worker.step(load.prefill())
    run, number = worker._runner.dispatcher.forward, 0

    def chosen(layer: int, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return run(layer, x, mine[number, :, layer].to(index.dtype), weight)

    worker._runner.dispatcher.forward = chosen  # type: ignore[method-assign]
    while (steps := pipe.recv()) is not None:
        seen = []
        for _ in range(steps):
            fetches.clear()
            begin = time.perf_counter()
            worker.step(load.decode())
            passed_s = time.perf_counter() - begin
            seen.append(Step(step_s=passed_s, fetches=np.bincount(fetches, minlength=info.num_layers)))
            number += 1
        pipe.send(seen)


class Workers:
    """The processes of one setup."""

    def __init__(self, path: str, cache: str, setup: Setup, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(len(setup.placement.workers)):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(path, cache, setup, rank, case, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        doors = tuple(pipe.recv() for pipe in self._pipes)
        for pipe in self._pipes:
            pipe.send(doors)

    def run(self, steps: int) -> list[tuple[float, float]]:
        """(seconds of the slowest worker, fetches that the layers wait for) of each step."""
        for pipe in self._pipes:
            pipe.send(steps)
        turns: list[list[Step]] = [pipe.recv() for pipe in self._pipes]
        return [
            (max(one.step_s for one in step), float(np.max([one.fetches for one in step], axis=0).sum()))
            for step in zip(*turns, strict=True)
        ]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def _label(planner: str, dealt: bool) -> str:
    return f"{planner}, dealt" if dealt else planner


SETS = tuple(_label(planner, dealt) for planner in ("pinning", "plan") for dealt in (False, True))


def compare(test: Trace, placements: dict[str, Placement], device: int, path: str, args: argparse.Namespace) -> None:
    """Measure each placement with and without dealing, in turns, and print a line."""
    steps = decoding_steps(test, args.requests, args.steps)
    choices = np.stack([test.topk_ids[tokens] for tokens in steps]).astype(np.int64)
    case = Case(requests=args.requests, context=CONTEXT, steps=len(steps), most_requests=args.requests)
    setups = {
        (name, dealt): Setup(
            placement=placement, dealt=dealt, device_experts=device, fetch_s=args.fetch_ms / 1e3, choices=choices
        )
        for name, placement in placements.items()
        for dealt in (False, True)
        if _label(name, dealt) in args.sets
    }
    running = {key: Workers(path, str(args.cache), setup, case) for key, setup in setups.items()}
    for workers in running.values():
        workers.run(int(_WARM_UP * len(steps)))
    seen: dict[tuple[str, bool], list[tuple[float, float]]] = {key: [] for key in setups}
    left = len(steps) - int(_WARM_UP * len(steps))
    for turn in range(args.turns):
        for key, workers in running.items():
            seen[key] += workers.run(left * (turn + 1) // args.turns - left * turn // args.turns)
    for workers in running.values():
        workers.close()
    means = {key: np.mean(each, axis=0) for key, each in seen.items()}
    before = next(iter(means.values()))
    cells = [
        f"{1e3 * step_s:.0f} ({step_s / before[0] - 1:+.1%}) | {fetches:.1f} ({fetches / before[1] - 1:+.1%})"
        for step_s, fetches in means.values()
    ]
    print(f"| {args.name}, {device} | " + " | ".join(cells) + " |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device-experts", type=int, nargs="+", default=[4, 8], help="experts per layer and worker")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--fetch-ms", type=float, default=5.8, help="of DeepSeek-V2-Lite's at 24 Gb/s")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--plan-s", type=float, default=10.0)
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, default=SETS, help="the first one is what others are compared with"
    )
    args = parser.parse_args(argv)
    print(", ".join(f"{key} {value}" for key, value in where_and_when().items()))
    heads = [f"{name}: ms | fetches waited for" for name in SETS if name in args.sets]
    print("| trace, experts in memory | " + " | ".join(heads) + " |\n|" + "---|" * (1 + 2 * len(heads)))
    with tempfile.TemporaryDirectory() as scratch:
        args.cache = Path(scratch) / "experts"
        for path in args.traces:
            args.name = path.stem
            profile, test = load_trace(path, None).halves()
            model = make_random_checkpoint(
                Path(scratch) / path.stem, layers=test.num_layers, experts=test.num_experts, top_k=test.top_k
            )
            workers = make_workers(args.workers, nodes=args.workers, num_experts=test.num_experts, redundant=0)
            for device in args.device_experts:
                memory = WorkerMemory(
                    device_experts=device * profile.num_layers,
                    disk_fetch_s=args.fetch_ms / 1e3,
                    cache_slots=cache_slots_of(device),
                )
                problem = problem_from_trace(
                    profile, workers, memory=(memory,) * args.workers, tokens_per_step=args.requests
                )
                names = {"pinning": "pinning", "plan": "auto"}
                found = {n: plan(problem, planner=p, deadline_s=args.plan_s).placement for n, p in names.items()}
                compare(test, found, device, str(model), args)


if __name__ == "__main__":
    main()
