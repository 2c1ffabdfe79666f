"""Serve one checkpoint with this project and, where installed, its peers, one after the other, and compare them.

    python -m tests.bench.serving [--model DIR] [--workers 2,1] [--vllm VENV] [--llama-cpp SOURCE] [--repeat N]

Without --model the checkpoint "mid" is made: Qwen3-MoE, 12 layers of 32 experts, 659 M parameters, bfloat16.
Writes results.json, .csv, .md and .png. Ratios within one run count; figures of different runs do not compare.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from elastic_moe.cluster.fit import CodePath, FitReport, Part, PartFit
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from tests.bench import servers
from tests.bench.client import LONG_PROMPT_TOKENS, Client
from tests.bench.machine import floor_of, measure_machine, where_and_when
from tests.bench.processes import cpu_between, cpu_times, memory_bytes
from tests.bench.report import Run, load, report, save
from tests.bench.servers import MODEL_NAME, Running, Server, serving
from tests.bench.truth import Truth
from tests.model.random_checkpoint import make_random_checkpoint

ENGINE_TTFT = "emoe:engine_time_to_first_token_seconds"


def mid_checkpoint(out: Path) -> Path:
    path = out / "mid"
    if not (path / "config.json").exists():
        print("making the checkpoint 'mid' (1.3 GB)", flush=True)
        make_random_checkpoint(
            path, "qwen3_moe", hidden=1024, layers=12, experts=32, top_k=4, ff=512, vocab=8192, dtype="bfloat16"
        )
    return path


def run_server(
    server: Server, model: Path, truth: Truth, concurrency: Sequence[int], round_number: int, out: Path
) -> Run:
    """Start a server, put it under every load, stop it."""
    started = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    machine = measure_machine()
    log = out / f"{server.name.replace(',', '').replace(' ', '-')}.log"
    with serving(server, log) as running:
        client = Client(running.url, MODEL_NAME, vocab=open_checkpoint(model).info.vocab_size, seed=round_number)
        client.warm_up()
        truth.check(client, server.name)
        before = _engine_ttft(running)
        lone_ttft_ms = client.lone_ttft_ms()
        engine_ttft_ms = _mean_between(before, _engine_ttft(running))
        prefill = client.prefill_tokens_per_s()
        measured = []
        cpu_s: dict[str, float] = {}
        for c in concurrency:
            times = cpu_times(running.pid) if server.ours else {}
            measured.append(client.measure(c))
            if server.ours:
                cpu_s = cpu_between(times, cpu_times(running.pid))
            print(f"{server.name}: {measured[-1]}", flush=True)
        fit = _fit(running)
        # what the load has touched stays, so this is the most
        memory = memory_bytes(running.pid)
    return Run(
        server=server.name,
        peer=server.peer,
        started=started,
        machine=machine,
        measured=measured,
        prefill_tokens_per_s=prefill,
        lone_ttft_ms=lone_ttft_ms,
        engine_ttft_ms=engine_ttft_ms,
        memory_bytes=memory,
        cpu_s=cpu_s,
        fit=fit,
    )


def _fit(running: Running) -> str:
    """The first worker's report in one line; empty for a peer."""
    if not running.server.ours:
        return ""
    rows = httpx.get(f"{running.url}/admin/workers").raise_for_status().json()[0]["fit"]
    parsed = (row | {"part": Part(row["part"]), "path": CodePath(row["path"])} for row in rows)
    return FitReport(rows=tuple(PartFit(**row) for row in parsed)).summary()


def _engine_ttft(running: Running) -> tuple[float, float] | None:
    """(requests, seconds in all) that the engine itself has counted up to their first tokens."""
    if not running.server.ours:
        return None
    text = httpx.get(f"{running.url}/metrics").raise_for_status().text
    samples = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    if f"{ENGINE_TTFT}_count" not in samples:
        return None
    return samples[f"{ENGINE_TTFT}_count"], samples[f"{ENGINE_TTFT}_sum"]


def _mean_between(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    """Milliseconds per request."""
    if before is None or after is None:
        return None
    return 1e3 * (after[1] - before[1]) / (after[0] - before[0])


def chosen_servers(args: argparse.Namespace, model: Path) -> list[Server]:
    """Ours first, then the peers that were named."""
    kv_tokens, workers = args.kv_tokens, [n for n in map(int, args.workers.split(",")) if n]
    chosen = [servers.ours(model, n, args.serve_args.split(), kv_tokens=kv_tokens) for n in workers]
    if args.vllm:
        chosen.append(servers.vllm(args.vllm, model))
    if args.llama_cpp:
        sequence = servers.MAX_MODEL_LEN if kv_tokens is None else kv_tokens // servers.SLOTS
        chosen += [
            servers.llama_cpp(args.llama_cpp, model, args.out, kind, sequence=sequence)
            for kind in args.llama_types.split(",")
        ]
    return chosen


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint; 'mid' is made if not given")
    parser.add_argument("--workers", default="2", help="numbers of our workers, each served in turn; 0: none")
    parser.add_argument("--serve-args", default="", help="further arguments for emoe serve, in one string")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--vllm", type=Path, metavar="VENV", help="virtual environment with vLLM")
    parser.add_argument("--llama-cpp", type=Path, metavar="SOURCE", help="llama.cpp's source tree, built in build/")
    parser.add_argument("--llama-types", default="bf16", help="types to convert to: bf16, q8_0; ratios are over bf16")
    parser.add_argument(
        "--kv-tokens",
        type=int,
        metavar="TOKENS",
        help="give all workers together, and llama.cpp, room for keys and values of this number of tokens; llama.cpp "
        f"always has {servers.SLOTS * servers.MAX_MODEL_LEN} otherwise, and we take what is free",
    )
    parser.add_argument("--repeat", type=int, default=1, help="rounds over all servers; medians are shown")
    parser.add_argument("--append", action="store_true", help="add to the runs that are in --out")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args()
    if args.kv_tokens is not None:
        if args.vllm:
            parser.error("--kv-tokens: vLLM's room is not set by it; leave --vllm out")
        if args.kv_tokens < (least := servers.SLOTS * (LONG_PROMPT_TOKENS + 1)):
            parser.error(f"--kv-tokens: expected {least} at least, as each of {servers.SLOTS} slots takes every prompt")
    return args


def main() -> int:
    # so that a server never outlives a benchmark that is ended
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.model or mid_checkpoint(args.out)
    about = where_and_when() | {"model": model.name, "command": " ".join(["tests.bench.serving", *sys.argv[1:]])}
    floor = floor_of(model)
    truth = Truth.of(model)
    chosen = chosen_servers(args, model)
    if not chosen:
        print("there is no server to measure: give --workers, --vllm or --llama-cpp", file=sys.stderr)
        return 2
    runs = load(args.out) if args.append else []
    concurrency = sorted(int(c) for c in args.concurrency.split(","))
    for number in range(args.repeat):
        # there and back again, so that a machine that slows down does so for all
        for server in chosen[:: -1 if number % 2 else 1]:
            runs.append(run_server(server, model, truth, concurrency, number, args.out))
            save(runs, about, floor, args.out)
    print("\n" + report(runs, about, floor))
    return 0


if __name__ == "__main__":
    sys.exit(main())
