"""API replicas as they are, behind uvicorn, with an engine that makes a token of every request at a steady pace.

Replicas, the engine and the clients have processes of their own. What is measured is the CPU time of a replica for each
token that its clients have read: from the engine's message to the event in the socket. HAProxy is not in it.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import uvicorn
import uvloop

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.engine.clients import Clients
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.messages.columns import column_of
from elastic_moe.cluster.messages.requests import Endpoint, GenerateRequest, RequestId, TokenOutput, Tokens
from elastic_moe.cluster.messages.views import Readiness
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.backend.groups import Groups
from elastic_moe.deploy.backend.ray_backend import RayBackend
from elastic_moe.deploy.launch.builtin import MODEL, MODEL_DIR
from elastic_moe.deploy.web.direct import serve_directly

FIRST_TOKEN, NUM_TOKENS = 300, 2000
"""The tokens that the engine makes, one after the other: words and parts of words."""
LONGEST = 900
"""Tokens of an answer. A client asks again when it ends."""
SETTLED_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiCost:
    replicas: int
    streams: int
    tokens_per_s: float
    """That all clients have read."""
    token_s: float
    """Seconds that a replica computes for each token."""
    longest_s: float
    """The longest time for which a replica's event loop was held."""


class PacedEngine:
    """In place of the scheduler: every request has its next token at the same time."""

    def __init__(self) -> None:
        self.clients = Clients(self, submitted=lambda: None)  # type: ignore[arg-type]
        self._made: dict[RequestId, int] = {}

    def add(self, request: GenerateRequest) -> TokenOutput | None:
        self._made[request.request_id] = 0
        return None

    def abort(self, request_id: RequestId) -> bool:
        return self._made.pop(request_id, None) is not None

    async def run(self, interval_s: float) -> None:
        due = time.monotonic()
        while True:
            due += interval_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            names, made = tuple(self._made), list(self._made.values())
            tokens = column_of([FIRST_TOKEN + number % NUM_TOKENS for number in made])
            self.clients.deliver((), Tokens(request_ids=names, offsets=column_of(made), token_ids=tokens))
            self._made = {name: number + 1 for name, number in zip(names, made, strict=True)}


class _Call:
    """`handle.method.remote()` with an answer that is known."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def remote(self, *arguments: Any) -> Any:
        return self._answer


class _StandIn:
    """The handle of an actor whose answers never change."""

    def __init__(self, **answers: Any) -> None:
        for name, answer in answers.items():
            setattr(self, name, _Call(answer))


async def _replica(endpoint: Endpoint, pipe: Connection) -> None:
    engine = Remote[Any](_StandIn(endpoint=endpoint))
    readiness = Readiness(ready=True, reason="serving")
    coordinator = Remote[Coordinator](_StandIn(engine=engine, readiness=readiness, model_info=MODEL))

    def group(number: int, lost: Callable[[], None]) -> RayBackend:
        return RayBackend(coordinator, recovery_timeout_s=600, number=number, lost=lost)

    backend = Groups(1, group)
    service = Service(ServeConfig(), backend, str(MODEL_DIR))
    backend.begin()
    await service.begin()
    serve_directly()
    config = uvicorn.Config(create_app(service), port=0, log_level="warning", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started or not (await service.readiness()).ready:
        await asyncio.sleep(0.05)
    pipe.send(server.servers[0].sockets[0].getsockname()[1])
    while await asyncio.to_thread(pipe.recv):
        pipe.send((time.process_time(), backend.loop_watch.longest_s))
        # the next answer tells of the time since this one
        backend.loop_watch.longest_s = 0.0
    server.should_exit = server.force_exit = True
    await serving
    await backend.end()
    service.close()


async def _engine(interval_s: float, pipe: Connection) -> None:
    engine = PacedEngine()
    pipe.send(await engine.clients.listen("127.0.0.1"))
    running = asyncio.create_task(engine.run(interval_s))
    await asyncio.to_thread(pipe.recv)
    running.cancel()


class _Readers:
    """Streams that count their events."""

    def __init__(self) -> None:
        self.tokens = 0

    async def read(self, port: int, number: int) -> None:
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = json.dumps(
                {
                    "prompt": f"stream {number}",
                    "max_tokens": LONGEST,
                    "stream": True,
                    "ignore_eos": True,
                    "temperature": 0,
                }
            ).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
            while data := await reader.read(1 << 16):
                self.tokens += data.count(b"data: {")
            writer.close()


async def _read(ports: list[int], streams: int, pipe: Connection) -> None:
    # clients are elsewhere: they do not take a replica's core from it each time that it writes
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    readers = _Readers()
    tasks = [asyncio.create_task(readers.read(port, n)) for port in ports for n in range(streams)]
    while await asyncio.to_thread(pipe.recv):
        pipe.send(readers.tokens)
    for task in tasks:
        task.cancel()


def _run(work: Callable[..., Any], *arguments: Any) -> None:
    # as in Ray's processes
    uvloop.run(work(*arguments))


@contextmanager
def _process(work: Callable[..., Any], *arguments: Any) -> Iterator[Connection]:
    """Run `work` in a process of its own, which a False in the pipe ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(work, *arguments, theirs))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.send(False)
        process.join(10)
        process.kill()


def _asked(*pipes: Connection) -> list[Any]:
    """What each of these processes has counted."""
    for pipe in pipes:
        pipe.send(True)
    return [pipe.recv() for pipe in pipes]


def measure(replicas: int, streams: int, *, seconds: float, interval_s: float) -> ApiCost:
    """`streams`: of each replica, each of which gets a token every `interval_s`."""
    with ExitStack() as stack:
        endpoint = stack.enter_context(_process(_engine, interval_s)).recv()
        pipes = [stack.enter_context(_process(_replica, endpoint)) for _ in range(replicas)]
        ports = [pipe.recv() for pipe in pipes]
        readers = stack.enter_context(_process(_read, ports, streams))
        while _asked(readers)[0] < replicas * streams:
            time.sleep(0.1)
        time.sleep(SETTLED_S)
        (before,), spent, begin = _asked(readers), _asked(*pipes), time.monotonic()
        time.sleep(seconds)
        (after,), counted, took_s = _asked(readers), _asked(*pipes), time.monotonic() - begin
    tokens = after - before
    return ApiCost(
        replicas=replicas,
        streams=streams,
        tokens_per_s=tokens / took_s,
        token_s=(sum(cpu_s for cpu_s, _ in counted) - sum(cpu_s for cpu_s, _ in spent)) / tokens,
        longest_s=max(longest_s for _, longest_s in counted),
    )
