"""What open pages cost: processor time of the server's processes, and the time between tokens, with 0, 1 and 100 pages.

    python -m tests.bench.page_cost                         # the API over a fake backend: 6 x 16 experts on 4 workers
    python -m tests.bench.page_cost --large                 # 58 x 256 experts on 64 workers
    python -m tests.bench.page_cost --url URL --pid PID ... # a real server, and processes of it by their ids
    python -m tests.bench.page_cost --url URL --streams 4   # requests run meanwhile: their time between two tokens

A page is a connection to /admin/events that reads everything, from a process of its own. The numbers of pages take
turns within one run, so that a change of the machine's load meets all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import multiprocessing.connection
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil

from tests.deploy.fakes import make_tokenizer
from tests.deploy.moving_cluster import MovingCluster, served

PAGES = (0, 1, 100)
SETTLE_S = 3.0
"""Seconds after the pages have connected, in which they get their snapshots."""
PROMPT = "And it came to pass in those days, that"


@dataclass(kw_only=True)
class Turn:
    """What was measured with one number of pages, over all its turns."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[dict[str, float]] = field(default_factory=list)
    """By process, for each turn."""
    nbytes: int = 0
    gaps_s: list[float] = field(default_factory=list)

    def row(self, pages: int) -> dict[str, float]:
        row: dict[str, float] = {"pages": pages}
        for process in self.cpu_s[0] if self.cpu_s else ():
            shares = [cpu[process] / seconds for cpu, seconds in zip(self.cpu_s, self.seconds, strict=True)]
            row[f"cpu {process}"] = round(statistics.median(shares), 4)
        if pages:
            row["kb_per_s_each"] = round(self.nbytes / sum(self.seconds) / pages / 1000, 3)
        if self.gaps_s:
            ordered = sorted(self.gaps_s)
            row["token_ms"] = round(1000 * statistics.median(ordered), 2)
            row["token_ms_mean"] = round(1000 * statistics.fmean(ordered), 2)
            row["token_ms_p99"] = round(1000 * ordered[len(ordered) * 99 // 100], 2)
            row["tokens"] = len(ordered)
        return row


# --- Pages, in a process of their own -----------------------------------------------------------------------------


async def _follow(client: httpx.AsyncClient, url: str, seen: list[int]) -> None:
    async with client.stream("GET", f"{url}/admin/events") as response:
        response.raise_for_status()
        async for part in response.aiter_raw():
            seen[0] += len(part)


async def _follow_all(url: str, pages: int, pipe: multiprocessing.connection.Connection) -> None:
    seen = [0]
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        followers = [asyncio.create_task(_follow(client, url, seen)) for _ in range(pages)]
        while await asyncio.to_thread(pipe.recv):
            assert not any(follower.done() for follower in followers), "a page has lost its connection"
            pipe.send(seen[0])
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)


def _open_pages(url: str, pages: int, pipe: multiprocessing.connection.Connection) -> None:
    asyncio.run(_follow_all(url, pages, pipe))


class _Pages:
    def __init__(self, url: str, pages: int) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_open_pages, args=(url, pages, theirs))
        self._process.start()

    def seen(self) -> int:
        """Bytes that all pages have got."""
        self._pipe.send(True)
        count: int = self._pipe.recv()
        return count

    def close(self) -> None:
        self._pipe.send(False)
        self._process.join()


# --- Requests that run meanwhile ----------------------------------------------------------------------------------


async def _stream(client: httpx.AsyncClient, url: str, gaps_s: list[float]) -> None:
    """Answers of 200 tokens, one after another; appends the seconds between two tokens."""
    body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
    while True:
        last = None
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    now = time.perf_counter()
                    if last is not None:
                        gaps_s.append(now - last)
                    last = now


async def _wait(url: str, seconds: float, streams: int, turn: Turn) -> None:
    async with httpx.AsyncClient(timeout=None) as client:
        running = [asyncio.create_task(_stream(client, url, turn.gaps_s)) for _ in range(streams)]
        await asyncio.sleep(seconds)
        assert not any(task.done() for task in running), "a request has failed"
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


# --- The measurement ----------------------------------------------------------------------------------------------


def measure(url: str, pids: Sequence[int], pages: int, seconds: float, streams: int, turn: Turn) -> None:
    opened = _Pages(url, pages)
    time.sleep(SETTLE_S)
    processes = {f"{psutil.Process(pid).name()}[{pid}]": psutil.Process(pid) for pid in pids}
    seen, before, began = opened.seen(), {name: sum(p.cpu_times()[:2]) for name, p in processes.items()}, time.time()
    asyncio.run(_wait(url, seconds, streams, turn))
    turn.seconds.append(time.time() - began)
    turn.cpu_s.append({name: sum(p.cpu_times()[:2]) - before[name] for name, p in processes.items()})
    turn.nbytes += opened.seen() - seen
    opened.close()


def _serve(large: bool, pipe: multiprocessing.connection.Connection) -> None:
    with TemporaryDirectory() as folder:
        model = Path(folder) / "tiny-moe"
        make_tokenizer(model)
        shape = {"layers": 58, "experts": 256, "size": 64, "spare": 1} if large else {}
        backend = MovingCluster(drifts=True, **shape)
        with served(backend, model) as url:
            pipe.send(url)
            pipe.recv()


@contextmanager
def _own_server(large: bool) -> Iterator[tuple[str, int]]:
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(large, theirs))
    server.start()
    assert server.pid is not None
    yield ours.recv(), server.pid
    ours.send(None)
    server.join()


def main() -> None:
    parser = argparse.ArgumentParser(description="What open pages cost a server.")
    parser.add_argument("--url", help="address of a real server")
    parser.add_argument("--pid", type=int, nargs="*", default=[], help="ids of the server's processes to measure")
    parser.add_argument("--large", action="store_true", help="58 x 256 experts on 64 workers")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of one turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of each number of pages")
    parser.add_argument("--streams", type=int, default=0, help="requests that run meanwhile")
    args = parser.parse_args()
    turns = {pages: Turn() for pages in PAGES}

    def run(url: str, pids: Sequence[int]) -> None:
        for _ in range(args.turns):
            for pages, turn in turns.items():
                measure(url, pids, pages, args.seconds, args.streams, turn)
        for pages, turn in turns.items():
            print(json.dumps(turn.row(pages)), flush=True)

    if args.url is not None:
        run(args.url, args.pid)
        return
    with _own_server(args.large) as (url, pid):
        run(url, [pid])


if __name__ == "__main__":
    main()
