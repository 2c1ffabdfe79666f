"""What open pages cost: the share of a core that the API's process takes, with 0, 1 and 100 of them.

    python -m tests.bench.page_cost                     # the API over a backend in process: 6 x 16 experts on 4 workers
    python -m tests.bench.page_cost --large             # 58 x 256 experts on 64 workers
    python -m tests.bench.page_cost --url URL --pid PID # a real server, and the process of its API replica

The pages are connections to /admin/events that read everything, from this process. `--tokens` lets one request run
meanwhile and prints its tokens per second, so that a slower step would be seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import multiprocessing.connection
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil

from tests.deploy.fakes import make_tokenizer
from tests.deploy.moving_cluster import MovingCluster, served

PAGES = (0, 1, 100)


async def _follow(client: httpx.AsyncClient, url: str, seen: list[int]) -> None:
    async with client.stream("GET", f"{url}/admin/events") as response:
        response.raise_for_status()
        async for part in response.aiter_raw():
            seen[0] += len(part)


async def _tokens_per_s(client: httpx.AsyncClient, url: str, tokens: int) -> float:
    body = {"prompt": "And it came to pass", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    began = time.perf_counter()
    (await client.post(f"{url}/v1/completions", json=body)).raise_for_status()
    return tokens / (time.perf_counter() - began)


async def measure(url: str, pid: int, pages: int, seconds: float, tokens: int) -> dict[str, float]:
    """CPU share of process `pid`, and kB per second that all pages got."""
    process, seen = psutil.Process(pid), [0]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        followers = [asyncio.create_task(_follow(client, url, seen)) for _ in range(pages)]
        # past the snapshots
        await asyncio.sleep(3)
        seen[0], before, began = 0, sum(process.cpu_times()[:2]), time.perf_counter()
        speed = await _tokens_per_s(client, url, tokens) if tokens else 0.0
        await asyncio.sleep(max(0.0, seconds - (time.perf_counter() - began)))
        elapsed_s = time.perf_counter() - began
        share = (sum(process.cpu_times()[:2]) - before) / elapsed_s
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
    return {"pages": pages, "cpu_share": round(share, 4), "kb_per_s": round(seen[0] / elapsed_s / 1000, 2),
            "tokens_per_s": round(speed, 1)}  # fmt: skip


def _serve(large: bool, pipe: multiprocessing.connection.Connection) -> None:
    with TemporaryDirectory() as folder:
        model = Path(folder) / "tiny-moe"
        make_tokenizer(model)
        shape = {"layers": 58, "experts": 256, "size": 64, "spare": 1} if large else {}
        backend = MovingCluster(drifts=True, **shape)
        with served(backend, model) as url:
            pipe.send(url)
            pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description="What open pages cost the API's process.")
    parser.add_argument("--url", help="of a real server")
    parser.add_argument("--pid", type=int, help="process of its API replica")
    parser.add_argument("--large", action="store_true", help="58 x 256 experts on 64 workers")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each figure is measured")
    parser.add_argument("--tokens", type=int, default=0, help="tokens of a request that runs meanwhile")
    args = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(args.large, theirs))
    url, pid = args.url, args.pid
    if url is None:
        server.start()
        url, pid = ours.recv(), server.pid
    for pages in PAGES:
        print(json.dumps(asyncio.run(measure(url, pid, pages, args.seconds, args.tokens))), flush=True)
    if server.pid is not None:
        ours.send(None)
        server.join()


if __name__ == "__main__":
    main()
