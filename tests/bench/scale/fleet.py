"""Simulated workers: they take plans over the real wire, and answer when a device would have computed the step."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

from elastic_moe.actors.remote.codec import Message, new_token
from elastic_moe.actors.remote.links import Link, listen
from elastic_moe.cluster.messages.columns import column_of
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.messages.steps import Done, Sample, StepPlan, StepResult

TOKEN = 7
TOKENS = column_of([TOKEN] * (1 << 16))


class FleetWorker:
    """Runs one step after the other, each for `step_s` seconds and `token_s` more for each token past the first 256."""

    def __init__(self, step_s: float, token_s: float) -> None:
        self._step_s = step_s
        self._token_s = token_s
        self._decoding = 0
        self._free_at = 0.0

    async def listen(self) -> Endpoint:
        _, endpoint = await listen("127.0.0.1", new_token(), self._received, lambda link: None)
        return endpoint

    def _received(self, link: Link, message: Message) -> None:
        if not isinstance(message, StepPlan):
            link.send(Done())
            return
        if message.decoding.seats is not None:
            self._decoding = len(message.decoding.seats) // 4
        loop = asyncio.get_running_loop()
        took_s = self._step_s + self._token_s * max(0, max(message.tokens_per_rank) - 256)
        self._free_at = max(loop.time(), self._free_at) + took_s
        result = StepResult(
            step=message.step,
            samples=tuple(Sample(request_id=c.request_id, token_id=TOKEN) for c in message.chunks if c.samples),
            tokens=TOKENS[: 4 * self._decoding],
            compute_s=took_s,
        )
        loop.call_at(self._free_at, link.send, result)


async def _serve(count: int, step_s: float, token_s: float, pipe: Connection) -> None:
    pipe.send([await FleetWorker(step_s, token_s).listen() for _ in range(count)])
    await asyncio.to_thread(pipe.recv)


def _run(count: int, step_s: float, token_s: float, pipe: Connection) -> None:
    asyncio.run(_serve(count, step_s, token_s, pipe))


@contextmanager
def fleet(workers: int, processes: int, *, step_s: float, token_s: float) -> Iterator[Sequence[Endpoint]]:
    """Where the workers listen. They end with the block."""
    context = multiprocessing.get_context("spawn")
    shares = [share for n in range(processes) if (share := len(range(n, workers, processes)))]
    running = []
    try:
        for share in shares:
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(share, step_s, token_s, theirs), daemon=True)
            process.start()
            running.append((process, ours))
        yield [endpoint for _, pipe in running for endpoint in pipe.recv()]
    finally:
        for process, pipe in running:
            pipe.send(None)
            process.join(10)
