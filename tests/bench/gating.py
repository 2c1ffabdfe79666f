"""Dynamic gating against its rivals on one expert layer (after Huang et al., arXiv 2303.06182, figures 6 and 7).

    python -m tests.bench.gating [--tokens 8,32,128,512,2048] [--workers 1,2] [--policies P,P] [--trace FILE] [--out D]

The rivals are re-implementations of their policies (tests/bench/gating_policies.py) over the same products in bfloat16;
one row of ours has those products too, and one does without the native library. Workers are processes that share the
cores and exchange tokens through shared memory. Policies are timed in turns. Choices of experts are drawn from a trace:
a generated one with the statistics of a real one (optimizer/study/generate.py), or the middle layer of --trace. Writes
gating.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elastic_moe.model.exchange.shared_memory import SharedMemoryTransport
from elastic_moe.model.exchange.transports import LocalTransport, Transport
from elastic_moe.model.fitting.fit import experts_path, layer_experts
from elastic_moe.optimizer.study.generate import generate_trace
from elastic_moe.optimizer.study.traces import load_trace
from tests.bench.gating_policies import OURS, OURS_ALIKE, POLICIES, GatedExperts, Member, Policy, make_policy, swap
from tests.bench.machine import where_and_when
from tests.bench.report import markdown

PLAIN = f"{OURS}, PyTorch only"
"""Ours in processes without the native library."""
ROWS = (*POLICIES, PLAIN)
BATCHES = 8
"""Number of different batches, which are run in turn."""
TURNS = 3
"""Turns over all policies for one number of tokens, since the machine's speed changes and must not decide."""
CASE_S = 0.2
"""Seconds for which a policy is measured in a turn, about."""
LEAN = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    "LRU_CACHE_CAPACITY": "1",
}
"""Environment in which freed memory is returned at once and oneDNN caches no code, so that a peak counts used memory.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    hidden: int
    width: int
    experts: int
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One policy with one number of tokens in all workers together."""

    policy: str
    workers: int
    tokens: int
    call_ms: float
    """Median over calls of the first worker; they are in lock-step."""
    padding: float
    """Computed rows divided by wanted rows that were not dropped, minus 1."""
    dropped: float
    """Share of the choices that were dropped since an expert was full."""
    peak_bytes: int = 0
    """Peak memory beside the weights, of all workers together."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.call_ms * 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process of a group does."""

    rank: int
    size: int
    group: str
    layer: Layer
    policies: Sequence[str]
    tokens: Sequence[int]
    choices: np.ndarray
    """[N, K] experts of the trace's tokens."""
    memory: bool
    """Whether peaks are measured instead of times."""


def draw_batches(choices: np.ndarray, tokens: int, hidden: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """BATCHES times (hidden states [T, H], choices [T, K], weights [T, K]) of tokens drawn from a trace's."""
    rng = np.random.default_rng(seed)
    g = torch.Generator().manual_seed(seed)
    for _ in range(BATCHES):
        index = torch.from_numpy(choices[rng.integers(len(choices), size=tokens)].astype(np.int64))
        weight = torch.rand(index.shape, generator=g)
        yield torch.randn(tokens, hidden, generator=g).bfloat16(), index, weight / weight.sum(1, keepdim=True)


def run_task(task: Task) -> list[Result]:
    """In a process of its own: every policy with every number of tokens, in the same order as the other ranks."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // task.size))
    torch.set_grad_enabled(False)
    layer = task.layer
    module = GatedExperts(layer.experts, layer.hidden, layer.width, torch.bfloat16)
    transport = _join(task)
    member = Member(
        transport=transport,
        group=f"{task.group}-member",
        top_k=layer.top_k,
        max_tokens=max(task.tokens) // task.size,
    )

    def make(name: str) -> Policy:
        policy = make_policy(name, module, member)
        for x, index, weight in draw_batches(task.choices, 8, layer.hidden, task.rank):
            policy(x, index, weight)
        return policy

    def batches(tokens: int) -> list[Batch]:
        return list(draw_batches(task.choices, tokens // task.size, layer.hidden, tokens + task.rank))

    found: list[Result] = []
    if task.memory:
        # one policy at a time, so that no other's weights are there
        for name in task.policies:
            policy = make(name)
            found += [_measure(task, name, policy, batches(tokens), transport) for tokens in sorted(task.tokens)]
    else:
        policies = {name: make(name) for name in task.policies}
        for tokens in sorted(task.tokens):
            drawn = batches(tokens)
            turns = [
                [_measure(task, name, policy, drawn[at:] + drawn[:at], transport) for name, policy in policies.items()]
                for at in range(0, BATCHES, -(-BATCHES // TURNS))
            ]
            found += [median_turn(results) for results in zip(*turns, strict=True)]
    if task.rank == 0:
        print(f"{task.size} workers: {'memory' if task.memory else 'time'} measured", flush=True)
    transport.close()
    return sorted(found, key=lambda r: (task.policies.index(r.policy), r.tokens))


def median_turn(turns: Sequence[Result]) -> Result:
    """The turn whose time is in the middle."""
    return sorted(turns, key=lambda r: r.call_ms)[len(turns) // 2]


def _join(task: Task) -> Transport:
    if task.size == 1:
        return LocalTransport()
    # the largest message: all tokens of a worker want one expert, and the capacity adapts to it
    rows = max(task.tokens) // task.size * task.layer.experts // task.size
    max_bytes = rows * task.layer.hidden * 2 + (1 << 20)
    return SharedMemoryTransport(group=task.group, rank=task.rank, size=task.size, max_bytes=max_bytes, timeout_s=60.0)


Batch = tuple[Tensor, Tensor, Tensor]


def _measure(task: Task, name: str, policy: Policy, batches: Sequence[Batch], transport: Transport) -> Result:
    """Times of as many calls for every rank, or the peak of memory over all batches."""
    tokens = len(batches[0][0])
    wanted = tokens * task.layer.top_k
    calls = BATCHES if task.memory else _calls(policy, batches[0], transport)
    times, computed, dropped, peak_bytes = [], 0, 0, 0

    def run() -> None:
        nonlocal computed, dropped
        for i in range(calls):
            begin = time.perf_counter()
            policy(*batches[i % BATCHES])
            times.append(time.perf_counter() - begin)
            computed, dropped = computed + policy.computed_rows, dropped + policy.dropped_rows

    if task.memory:
        peak_bytes = _peak_bytes(run)
    else:
        run()
    return Result(
        policy=name,
        workers=task.size,
        tokens=tokens * task.size,
        call_ms=statistics.median(times) * 1e3,
        padding=computed / (calls * wanted - dropped) - 1,
        dropped=dropped / calls / wanted,
        peak_bytes=peak_bytes,
    )


def _calls(policy: Policy, batch: Batch, transport: Transport) -> int:
    """How many calls take about CASE_S, one for each of a turn's batches at least; all ranks do as many."""
    policy(*batch)
    begin = time.perf_counter()
    policy(*batch)
    calls = int(CASE_S / (time.perf_counter() - begin))
    counts = swap(transport, [torch.tensor([calls])] * transport.size, [8] * transport.size)
    return max(-(-BATCHES // TURNS), min(8 * BATCHES, int(torch.cat(counts).min())))


def _peak_bytes(run: Callable[[], None]) -> int:
    """By how much the process grows at most while `run` runs, in a new thread: buffers that threads keep count."""
    threads = torch.get_num_threads()

    def grow() -> int:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        # forgets the peak so far: proc_pid_clear_refs(5)
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
        run()
        return _memory("VmHWM") - before

    with ThreadPoolExecutor(1) as pool:
        return max(0, pool.submit(grow).result())


def _memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_group(make_task: Callable[[int], Task], size: int, environment: Mapping[str, str]) -> list[Result]:
    """The same tasks in `size` fresh processes with an environment. Rows are summed or averaged over them."""
    with (
        _environment(environment),
        ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        by_rank = list(pool.map(run_task, [make_task(rank) for rank in range(size)]))
    return [merge(results) for results in zip(*by_rank, strict=True)]


def merge(results: Sequence[Result]) -> Result:
    """One result of all ranks."""
    first = results[0]
    return Result(
        policy=first.policy,
        workers=first.workers,
        tokens=first.tokens,
        call_ms=first.call_ms,
        padding=statistics.mean(r.padding for r in results),
        dropped=statistics.mean(r.dropped for r in results),
        peak_bytes=sum(r.peak_bytes for r in results),
    )


def compare(
    layer: Layer, choices: np.ndarray, tokens: Sequence[int], workers: int, policies: Sequence[str] = ROWS
) -> list[Result]:
    """Each of the policies (names in ROWS) with every number of tokens: times, then memory, each in fresh processes."""

    def measured(policies: Sequence[str], environment: Mapping[str, str]) -> list[Result]:
        found: list[list[Result]] = []
        for memory in (False, True):
            group = f"emoe-gating-{uuid.uuid4().hex[:8]}"

            def task(rank: int, memory: bool = memory, group: str = group) -> Task:
                return Task(
                    rank=rank,
                    size=workers,
                    group=group,
                    layer=layer,
                    policies=policies,
                    tokens=tokens,
                    choices=choices,
                    memory=memory,
                )

            found.append(run_group(task, workers, environment | LEAN if memory else environment))
        return [Result(**asdict(timed) | {"peak_bytes": peak.peak_bytes}) for timed, peak in zip(*found, strict=True)]

    found = measured([name for name in policies if name != PLAIN], {})
    if PLAIN in policies:
        found += [Result(**asdict(result) | {"policy": PLAIN}) for result in measured([OURS], {"EMOE_NATIVE": "0"})]
    return found


def table(results: Sequence[Result]) -> str:
    """Tokens per second and peak memory by policy and number of tokens, padding and drops at the largest."""
    columns = sorted({r.tokens for r in results})
    head = ("policy", *(f"{n} tokens" for n in columns), "MB at most", "padding %", "dropped %")
    rows = []
    for policy in dict.fromkeys(r.policy for r in results):
        mine = sorted((r for r in results if r.policy == policy), key=lambda r: r.tokens)
        last = mine[-1]
        figures = (f"{last.peak_bytes / 1e6:.0f}", f"{100 * last.padding:.0f}", f"{100 * last.dropped:.1f}")
        rows.append([policy, *(f"{r.tokens_per_s:.0f}" for r in mine), *figures])
    return markdown(head, rows)


def not_ahead(results: Sequence[Result], policy: str = OURS) -> list[str]:
    """Where a rival is faster than `policy`, in words."""
    ours = {r.tokens: r for r in results if r.policy == policy}
    return [
        f"{r.policy} at {r.tokens} tokens: {r.tokens_per_s / ours[r.tokens].tokens_per_s:.2f} times ours"
        for r in results
        if not r.policy.startswith(OURS) and r.tokens_per_s > ours[r.tokens].tokens_per_s
    ]


def plot(groups: Mapping[int, Sequence[Result]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(groups), 2, figsize=(12, 4 * len(groups)), layout="constrained", squeeze=False)
    for (workers, results), (left, right) in zip(groups.items(), axes, strict=True):
        for policy in dict.fromkeys(r.policy for r in results):
            mine = [r for r in results if r.policy == policy]
            style = {"linewidth": 2.5, "color": "black"} if policy == OURS else {"linewidth": 1.2}
            if policy.startswith(f"{OURS},"):
                style |= {"color": "black", "linestyle": ":" if policy == OURS_ALIKE else "--"}
            x = [r.tokens for r in mine]
            left.plot(x, [r.tokens_per_s for r in mine], marker="o", markersize=4, label=policy, **style)
            right.plot(x, [max(0.1, r.peak_bytes / 1e6) for r in mine], marker="o", markersize=4, **style)
        title = f"{workers} worker{'s' if workers > 1 else ''}"
        left.set(title=f"{title}: tokens per second")
        right.set(title=f"{title}: peak activation memory, MB (0.1 or less as 0.1)")
        for ax in (left, right):
            ax.set(xscale="log", yscale="log", xlabel="tokens in a batch")
            ax.set_xticks(x, [str(n) for n in x], minor=False)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def routing(args: argparse.Namespace) -> tuple[Layer, np.ndarray]:
    """The layer's shape and the choices [N, K] of a trace's tokens."""
    if args.trace is not None:
        trace = load_trace(args.trace)
    else:
        trace = generate_trace(num_layers=1, num_experts=args.experts, top_k=args.top_k, num_tokens=8192)
    choices = np.asarray(trace.topk_ids[:, trace.num_layers // 2])
    layer = Layer(hidden=args.hidden, width=args.ff, experts=trace.num_experts, top_k=trace.top_k)
    return layer, choices


def chosen_policies(text: str) -> list[str]:
    """Those of ROWS whose names hold one of the parts, which commas separate. OURS is always there, to compare with.

    Raises argparse.ArgumentTypeError for a part that is in no name.
    """
    parts = [part.strip().lower() for part in text.split(",")]
    for part in parts:
        if not any(part in name.lower() for name in ROWS):
            raise argparse.ArgumentTypeError(f"no policy's name holds {part!r}; there are: {'; '.join(ROWS)}")
    return [name for name in ROWS if name == OURS or any(part in name.lower() for part in parts)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="8,32,128,512,2048", help="batch sizes, of all workers together")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument(
        "--policies",
        type=chosen_policies,
        default=list(ROWS),
        help="parts of their names, such as adaptive,fastmoe (default: all)",
    )
    parser.add_argument("--trace", type=Path, help="trace file; a trace is generated if not given")
    parser.add_argument("--experts", type=int, default=32, help="of the generated trace")
    parser.add_argument("--top-k", type=int, default=4, help="of the generated trace")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ff", type=int, default=512, help="width of an expert")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    layer, choices = routing(args)
    example = GatedExperts(1, 64, 64, torch.bfloat16)
    loads = np.bincount(choices.ravel(), minlength=layer.experts)
    about = where_and_when() | {
        "layer": f"{layer.experts} experts, top {layer.top_k}, hidden {layer.hidden}, width {layer.width}, bfloat16",
        "busiest expert": f"{loads.max() / loads.mean():.1f} times the mean",
        "routing": args.trace.name if args.trace else "generated",
        "our experts are served by": " ".join(filter(None, experts_path(layer_experts(example)))),
    }
    tokens = [int(n) for n in args.tokens.split(",")]
    groups = {n: compare(layer, choices, tokens, n, args.policies) for n in map(int, args.workers.split(","))}
    parts = ["; ".join(f"{name} {value}" for name, value in about.items()) + "\n"]
    for workers, results in groups.items():
        parts.append(f"{workers} worker{'s' if workers > 1 else ''}, tokens per second:\n\n{table(results)}")
        parts += [
            f"{policy} is not ahead of: {'; '.join(not_ahead(results, policy)) or 'none'}.\n"
            for policy in (OURS, OURS_ALIKE)
            if policy in args.policies
        ]
    text = "\n".join(parts)
    (args.out / "gating.md").write_text(text)
    results_json = {"about": about, "results": [asdict(r) for results in groups.values() for r in results]}
    (args.out / "gating.json").write_text(json.dumps(results_json, indent=1))
    plot(groups, args.out / "gating.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
