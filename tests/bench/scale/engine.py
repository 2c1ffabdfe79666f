"""The engine's scheduler, loop and clients in this process, workers and a client in others: what a step costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import psutil
import uvloop

from elastic_moe.actors.engine.clients import Clients
from elastic_moe.actors.engine.step_loop import StepLoop
from elastic_moe.actors.garbage import keep_collections_short
from elastic_moe.actors.loop_watch import LoopWatch
from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, TransportKind, WorkerInfo
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.placement import Worker, WorkerId, contiguous
from tests.bench.scale.client import MAX_TOKENS, PROMPT, start_client
from tests.bench.scale.fleet import fleet

BLOCK_SIZE = 16
MAX_MODEL_LEN = 200_000
MOST_STEPS = 1500
"""Steps for which there are KV blocks."""
FILL_S = 180.0
SETTLED_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCost:
    workers: int
    sequences: int
    steps: int
    step_s: float
    """Seconds from one step's end to the next one's."""
    device_s: float
    """Seconds that the simulated devices take for a step."""
    cpu_s: float
    """Seconds that the engine's process computes for a step."""
    admit_s: float
    """Seconds that the engine's process computed for each request until it decoded."""
    bytes_each: float
    """Growth of the engine's memory for each sequence until all decode, prompts included."""
    bytes_token: float
    """Growth of the engine's memory for each token after that."""
    longest_s: float
    """The longest time for which the engine's event loop was held while sequences decoded."""


class BenchEngine:
    def __init__(self, endpoints: Sequence[Endpoint], sequences: int) -> None:
        each = -(-sequences // len(endpoints))
        # a request that could outgrow a worker would be refused
        longest = -(-(PROMPT + MAX_TOKENS) // BLOCK_SIZE)
        self.blocks = max(longest, each * (-(-(PROMPT + MOST_STEPS) // BLOCK_SIZE) + 1))
        self.infos = {
            WorkerId(f"w{n}"): WorkerInfo(
                worker=WorkerId(f"w{n}"),
                node=f"n{n // 8}",
                endpoint=endpoint,
                pid=1,
                device="cuda",
                num_kv_blocks=self.blocks,
                memory_bytes=1,
            )
            for n, endpoint in enumerate(endpoints)
        }
        self.scheduler = Scheduler(
            {},
            block_size=BLOCK_SIZE,
            max_num_seqs=each,
            max_num_batched_tokens=8192,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=(0,),
        )
        self.clients = Clients(self.scheduler, submitted=lambda: self.loop.wake())
        self.loop = StepLoop(
            self.scheduler,
            self.clients,
            step_timeout_s=60.0,
            abort=lambda epoch, workers: None,
            report=_failed,
            late=_late,
        )

    async def begin(self) -> Endpoint:
        self.running = asyncio.create_task(self.loop.run())
        self.short = asyncio.create_task(keep_collections_short(lambda: self.scheduler.num_requests))
        members = tuple(Worker(id=worker, node=info.node, slots=4) for worker, info in self.infos.items())
        placement = contiguous(1, 4 * len(members), members)
        spec = EpochSpec(
            epoch=Epoch(1), placement=placement, group="bench", transport=TransportKind.LOCAL, rendezvous=""
        )
        await self.loop.change_epoch(spec, self.infos)
        return await self.clients.listen("127.0.0.1")

    @property
    def decoding(self) -> int:
        """Sequences that have had a token."""
        return self.clients.first_tokens


def _failed(epoch: Epoch, suspects: Sequence[WorkerId], reason: str) -> NoReturn:
    raise AssertionError(f"a step failed: {reason}")


def _late(workers: Iterable[WorkerId]) -> None:
    print("late:", *workers)


def measure(
    workers: int, sequences: int, *, processes: int, seconds: float, step_s: float, token_s: float
) -> EngineCost:
    with fleet(workers, processes, step_s=step_s, token_s=token_s) as endpoints:
        return uvloop.run(_measure(endpoints, sequences, seconds, step_s, token_s))


async def _measure(
    endpoints: Sequence[Endpoint], sequences: int, seconds: float, step_s: float, token_s: float
) -> EngineCost:
    engine = BenchEngine(endpoints, sequences)
    where = await engine.begin()
    process = psutil.Process()
    await asyncio.sleep(0.2)
    memory, cpu = process.memory_info().rss, time.process_time()
    client, pipe = start_client(where, sequences)
    try:
        async with asyncio.timeout(FILL_S):
            while engine.decoding < sequences:
                await asyncio.sleep(0.1)
        admit_s = (time.process_time() - cpu) / sequences
        filled, begun = process.memory_info().rss, engine.scheduler.status().steps
        watch = LoopWatch("the bench")
        watching = asyncio.create_task(watch.watch())
        await asyncio.sleep(SETTLED_S)
        watch.longest_s = 0.0
        steps, cpu, begin = engine.scheduler.status().steps, time.process_time(), time.perf_counter()
        await asyncio.sleep(seconds)
        done = engine.scheduler.status().steps - steps
        cpu_s, took_s = time.process_time() - cpu, time.perf_counter() - begin
        grown, tokens = process.memory_info().rss - filled, engine.scheduler.status().steps - begun
        assert engine.scheduler.num_requests == sequences, "a sequence has ended"
        watching.cancel()
        pipe.send(None)
        assert pipe.recv() > 0
    finally:
        client.kill()
        engine.running.cancel()
        engine.short.cancel()
        engine.clients.close()
    each = -(-sequences // len(endpoints))
    return EngineCost(
        workers=len(endpoints),
        sequences=sequences,
        steps=done,
        step_s=took_s / done,
        device_s=step_s + token_s * max(0, each - 256),
        cpu_s=cpu_s / done,
        admit_s=admit_s,
        bytes_each=(filled - memory) / sequences,
        bytes_token=grown / sequences / tokens,
        longest_s=watch.longest_s,
    )
