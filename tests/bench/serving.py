"""Serve one checkpoint with this project and, where installed, its peers, one after the other, and compare them.

    python -m tests.bench.serving [--model DIR] [--workers 2,1] [--concurrency 1,8,32] [--vllm VENV] [--out DIR]

Without --model the checkpoint "mid" is made: Qwen3-MoE, 12 layers of 32 experts, 659 M parameters, bfloat16.
Writes results.json, results.md and results.png. Ratios within one run count; figures of different runs do not compare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path

import httpx

from deploy.local_ray import free_port
from tests.bench.client import Measured, measure

Results = dict[str, list[Measured]]


@contextmanager
def serving(command: Sequence[str], url: str, log: Path, env: dict[str, str]) -> Iterator[None]:
    """Run a server until the block is left. Raises RuntimeError where it is not ready within ten minutes."""
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=os.environ | env, start_new_session=True
        )
    try:
        wait_until_ready(process, url, log)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/v1/models", timeout=5).is_success and httpx.get(
                f"{url}/ready", timeout=5
            ).status_code in (
                200,
                404,
            ):
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the server did not become ready; see {log}")


def ours(model: Path, workers: int, port: int) -> list[str]:
    emoe = str(Path(sys.executable).with_name("emoe"))
    return [
        *(emoe, "serve", str(model), "--workers", str(workers), "--port", str(port)),
        *("--max-model-len", "2048", "--served-model-name", "bench"),
    ]


def vllm(venv: Path, model: Path, port: int) -> list[str]:
    return [
        *(str(venv / "bin" / "vllm"), "serve", str(model), "--port", str(port)),
        *("--max-model-len", "2048", "--dtype", "bfloat16", "--served-model-name", "bench"),
    ]


VLLM_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "OMP_NUM_THREADS": "2",
}


def mid_checkpoint(out: Path) -> Path:
    from model.random_checkpoint import make_random_checkpoint

    path = out / "mid"
    if not (path / "config.json").exists():
        print("making the checkpoint 'mid' (1.3 GB)", flush=True)
        make_random_checkpoint(
            path, "qwen3_moe", hidden=1024, layers=12, experts=32, top_k=4, ff=512, vocab=8192, dtype="bfloat16"
        )
    return path


def table(results: Results) -> str:
    head = ("server", "concurrency", "output tok/s", "median TTFT ms", "median ITL ms", "p99 ITL ms")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for server, rows in results.items():
        for m in rows:
            figures = (f"{m.output_tokens_per_s:.0f}", f"{m.ttft_ms:.0f}", f"{m.itl_ms:.1f}", f"{m.itl_p99_ms:.0f}")
            lines.append(f"| {server} | {m.concurrency} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def plot(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for server, rows in results.items():
        x = [m.concurrency for m in rows]
        left.plot(x, [m.output_tokens_per_s for m in rows], marker="o", label=server)
        right.plot(x, [m.itl_ms for m in rows], marker="o", label=server)
    for axes, title in ((left, "output tokens per second"), (right, "median ms between tokens")):
        axes.set(xscale="log", xlabel="concurrent requests", title=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--workers", default="2", help="numbers of workers, each served in turn")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--vllm", type=Path, help="virtual environment with vLLM")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.model or mid_checkpoint(args.out)
    runs: list[tuple[str, list[str], int, dict[str, str]]] = []
    for workers in args.workers.split(","):
        port = free_port()
        runs.append((f"elastic-moe, {workers} workers", ours(model, int(workers), port), port, {}))
    if args.vllm:
        port = free_port()
        runs.append(("vLLM", vllm(args.vllm, model, port), port, VLLM_ENV))
    results: Results = {}
    for name, command, port, env in runs:
        url = f"http://127.0.0.1:{port}"
        log = args.out / f"{name.split(',')[0]}-{port}.log"
        with serving(command, url, log, env):
            results[name] = []
            for concurrency in (int(c) for c in args.concurrency.split(",")):
                results[name].append(measure(url, "bench", concurrency=concurrency))
                print(f"{name}: {results[name][-1]}", flush=True)
    head = f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {model.name}\n\n"
    (args.out / "results.md").write_text(head + table(results))
    (args.out / "results.json").write_text(
        json.dumps({k: [asdict(m) for m in v] for k, v in results.items()}, indent=1)
    )
    plot(results, args.out / "results.png")
    print("\n" + head + table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
