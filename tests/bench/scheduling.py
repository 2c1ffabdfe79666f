"""Measures what a decode step costs the engine without a model: CPU time of planning, committing, and the messages.

python -m tests.bench.scheduling [--workers 64] [--sequences 128 512 2048 4096 8192]

The workers are simulated in the same process, outside the measured time. Memory is what Python has allocated for the
sequences after their prompts, with the tokens, blocks and keys of the prompts.
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

from elastic_moe.actors.remote.codec import Frames, encode
from elastic_moe.actors.scheduler.flights import StepOutputs
from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.messages.columns import column_of
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.requests import GenerateRequest, Outputs, RequestId, SamplingParams
from elastic_moe.cluster.messages.seats import Seats
from elastic_moe.cluster.messages.steps import Sample, StepPlan, StepResult
from elastic_moe.cluster.placement import WorkerId

STEPS = 64
PROMPT = 64
BLOCK_SIZE = 16
PREFILL_TOKENS = 1 << 14
SETTLED_STEPS = 4


def answer(seats: Seats, plan: StepPlan) -> StepResult:
    """A worker's result, in which every token is the position of the token before it."""
    chunks = seats.chunks(plan)
    decoding = len(chunks) - len(plan.chunks)
    samples = [(chunk.request_id, 10 + chunk.known % 1000) for chunk in chunks if chunk.samples]
    return StepResult(
        step=plan.step,
        samples=tuple(Sample(request_id=name, token_id=token) for name, token in samples[decoding:]),
        tokens=column_of([token for _, token in samples[:decoding]]),
        compute_s=0.01,
    )


@dataclass(slots=True)
class Times:
    """CPU seconds of each part, one entry for each step."""

    schedule: list[float] = field(default_factory=list)
    commit: list[float] = field(default_factory=list)
    wire: list[float] = field(default_factory=list)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        begin = time.thread_time()
        yield
        getattr(self, name).append(time.thread_time() - begin)


class Engine:
    """The scheduler with two steps in flight, and workers that answer at once."""

    def __init__(self, workers: int, sequences: int) -> None:
        each = -(-sequences // workers)
        blocks = each * (-(-(PROMPT + 4 * STEPS) // BLOCK_SIZE) + 2)
        self.scheduler = Scheduler(
            {WorkerId(f"w{n}"): blocks for n in range(workers)},
            block_size=BLOCK_SIZE,
            max_num_seqs=each,
            max_num_batched_tokens=PREFILL_TOKENS,
            max_model_len=4096,
            eos_token_ids=(0,),
        )
        self.seats = {WorkerId(f"w{n}"): Seats() for n in range(workers)}
        self.frames = {worker: Frames() for worker in self.seats}
        self.flights: deque[dict[WorkerId, StepResult]] = deque()
        self.steps = 0

    def step(self, times: Times) -> StepOutputs:
        self.steps += 1
        with times.of("schedule"):
            plans = self.scheduler.schedule(Epoch(1), self.steps)
        assert plans is not None
        begin = time.thread_time()
        for plan in {id(plan): plan for plan in plans.values()}.values():
            encode(plan)
        wire_s = time.thread_time() - begin
        self.flights.append({worker: answer(self.seats[worker], plan) for worker, plan in plans.items()})
        if len(self.flights) < 2:
            return StepOutputs([], Outputs(outputs=()).tokens)
        results = {worker: encode(result) for worker, result in self.flights.popleft().items()}
        begin = time.thread_time()
        arrived = {worker: self.frames[worker].feed(data)[0] for worker, data in results.items()}
        wire_s += time.thread_time() - begin
        with times.of("commit"):
            outputs = self.scheduler.commit(arrived)  # type: ignore[arg-type]
        begin = time.thread_time()
        encode(Outputs(outputs=tuple(outputs.single), tokens=outputs.tokens))
        times.wire.append(wire_s + time.thread_time() - begin)
        return outputs


def fill(engine: Engine, sequences: int) -> None:
    """Add the sequences and run their prompts."""
    for n in range(sequences):
        engine.scheduler.add(
            GenerateRequest(
                request_id=RequestId(f"cmpl-{n:032x}-0"),
                # of all lengths, so that in every step some need a block
                prompt_token_ids=tuple((n + 7 * place) % 30_000 for place in range(PROMPT + n % BLOCK_SIZE)),
                params=SamplingParams(max_tokens=4 * STEPS, temperature=0),
            )
        )
    unused = Times()
    while engine.scheduler.status().waiting:
        engine.step(unused)
    for _ in range(SETTLED_STEPS):
        engine.step(unused)


def traced(work: Callable[[], None]) -> int:
    """Bytes that Python keeps of what `work` has allocated."""
    gc.collect()
    tracemalloc.start()
    work()
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--sequences", type=int, nargs="+", default=[128, 512, 2048, 4096, 8192])
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    options = parser.parse_args()
    for sequences in options.sequences:
        engine = Engine(options.workers, sequences)
        if options.memory:
            kept = traced(lambda engine=engine, sequences=sequences: fill(engine, sequences))
            print(f"{sequences:6} sequences: {kept / sequences:.0f} bytes each")
            continue
        fill(engine, sequences)
        times = Times()
        for _ in range(STEPS):
            assert len(engine.step(times)) == sequences
        parts = {name: 1e3 * median(getattr(times, name)) for name in ("schedule", "commit", "wire")}
        told = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
        print(f"{sequences:6} sequences: {sum(parts.values()):6.2f} ms a step ({told})")


if __name__ == "__main__":
    main()
