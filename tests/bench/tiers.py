"""A model that does not fit in memory: our workers with a disk tier, and llama.cpp under the same limit.

    python -m tests.bench.tiers --llama-cpp SOURCE

Our workers get memory for a share of the experts (`--share`), and the rest lies in records that are read past the page
cache. llama.cpp maps its file, and a cgroup limits its memory: to what it holds without a file behind it, and the
trunk's bytes, and the same share of the experts' bytes. So both have the same memory for experts, and the disk is a
disk for both. Needs the right to make a cgroup (memory_limit.py). Prints tokens per second, and what was read.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from tests.bench import servers
from tests.bench.client import Client, Measured
from tests.bench.machine import where_and_when
from tests.bench.memory_limit import MemoryGroup, memory_group
from tests.bench.processes import family, memory_bytes
from tests.bench.servers import MODEL_NAME, Running, Server, serving
from tests.bench.serving import mid_checkpoint

SEQUENCE = 256
"""Tokens of the longest sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One server under every load."""

    server: str
    memory_bytes: int
    """Of all its processes; of llama.cpp the limit."""
    measured: Sequence[Measured]
    read_gb: Sequence[float]
    """Read from the disk in each measurement, in the same order."""
    notes: str = ""


def read_bytes(pid: int) -> int:
    """What a process and its descendants have read from disks since they began."""
    total = 0
    for process in family(pid):
        try:
            total += process.io_counters().read_bytes
        except (psutil.Error, OSError):
            continue
    return total


def measure(running: Running, pid: int, vocab: int, args: argparse.Namespace) -> tuple[list[Measured], list[float]]:
    client = Client(running.url, MODEL_NAME, vocab=vocab, seed=0)
    client.warm_up()
    measured, read = [], []
    for concurrency in args.concurrency:
        before = read_bytes(pid)
        measured.append(client.measure(concurrency, per_slot=args.per_slot))
        read.append((read_bytes(pid) - before) / 1e9)
        print(f"{running.server.name}: {measured[-1]}, {read[-1]:.2f} GB read", flush=True)
    return measured, read


def run_ours(server: Server, vocab: int, args: argparse.Namespace) -> Result:
    with serving(server, args.out / "ours.log") as running:
        measured, read = measure(running, running.pid, vocab, args)
        return Result(
            server=server.name,
            memory_bytes=memory_bytes(running.pid),
            measured=measured,
            read_gb=read,
            notes=_tier_metrics(running),
        )


def _tier_metrics(running: Running) -> str:
    text = httpx.get(f"{running.url}/metrics").raise_for_status().text
    samples = [sample for found in text_string_to_metric_families(text) for sample in found.samples]
    wanted = ("emoe:expert_accesses_total", "emoe:expert_stall_seconds_total", "emoe:experts_resident")
    return ", ".join(
        f"{sample.name.removeprefix('emoe:')}{sorted(sample.labels.items())} {sample.value:.6g}"
        for sample in samples
        if sample.name in wanted
    )


def forget(path: Path) -> None:
    """Drop a file from the page cache. A cgroup answers only for pages that its own processes have read."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_llama_cpp(
    server: Server, group: MemoryGroup, mapped_bytes: int, vocab: int, args: argparse.Namespace
) -> Result:
    """`mapped_bytes` of its file may stay in memory."""
    with serving(replace(server, command=[*group.prefix, *server.command]), args.out / "llama.log") as running:
        # every buffer has been touched then, and the limit can be what they take and the share of the file
        Client(running.url, MODEL_NAME, vocab=vocab, seed=1).measure(max(args.concurrency), per_slot=1)
        limit = group.anonymous_bytes + mapped_bytes
        group.limit(limit)
        measured, read = measure(running, group.pids[0], vocab, args)
        return Result(server=server.name, memory_bytes=limit, measured=measured, read_gb=read)


def report(results: Sequence[Result], about: dict[str, str]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += [
        "| server | memory GB | concurrency | tokens/s | median ms between tokens | GB read |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        lines += [
            f"| {result.server} | {result.memory_bytes / 1e9:.2f} | {m.concurrency} | {m.output_tokens_per_s:.1f} |"
            f" {m.itl_ms:.1f} | {read:.2f} |"
            for m, read in zip(result.measured, result.read_gb, strict=True)
        ]
    if len(results) == 2:
        ratios = (
            f"{ours.output_tokens_per_s / theirs.output_tokens_per_s:.2f} at {ours.concurrency}"
            for ours, theirs in zip(results[0].measured, results[1].measured, strict=True)
        )
        lines += ["", f"Ours over llama.cpp: {', '.join(ratios)}."]
    return "\n".join([*lines, "", *(result.notes for result in results if result.notes)])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint; 'mid' is made if not given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.5, help="share of the experts that fit in memory")
    parser.add_argument("--serve-args", default="", help="further arguments for emoe serve, in one string")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--per-slot", type=int, default=1, help="requests of a slot, one after the other")
    parser.add_argument("--llama-cpp", type=Path, metavar="SOURCE", help="llama.cpp's source tree, built in build/")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    return parser.parse_args()


def main() -> int:
    # so that a server never outlives a benchmark that is ended
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.model or mid_checkpoint(args.out)
    info = open_checkpoint(model).info
    experts_bytes = info.expert_bytes * info.num_layers * info.num_logical_experts
    budget = int(args.share * experts_bytes) // args.workers
    cache = (args.out / "experts").resolve()
    ours = servers.ours(
        model,
        args.workers,
        [
            *("--expert-memory-bytes", str(budget), "--expert-cache-dir", str(cache), "--max-model-len", str(SEQUENCE)),
            *args.serve_args.split(),
        ],
    )
    results = [run_ours(ours, info.vocab_size, args)]
    if args.llama_cpp:
        peer = servers.llama_cpp(args.llama_cpp, model, args.out, "bf16", sequence=SEQUENCE)
        gguf = args.out / f"{model.name}-bf16.gguf"
        mapped = gguf.stat().st_size - int((1 - args.share) * experts_bytes)
        with ExitStack() as stack:
            group = stack.enter_context(memory_group())
            forget(gguf)
            results.append(run_llama_cpp(peer, group, mapped, info.vocab_size, args))
    about = where_and_when() | {"model": model.name, "share": f"{args.share:.0%}"}
    (args.out / "tiers.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    print("\n" + report(results, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
