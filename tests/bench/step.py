"""Steps of one worker in this process, without Ray: how near its arithmetic comes to what the machine allows.

`python -m tests.bench.step --model DIR --threads 1` prints the median milliseconds of a decode step for several batch
sizes, the tokens/s of a prefill, and the share of the memory or compute floor that is reached. Weights count in the
bytes that --expert-dtype and --trunk-dtype keep them in. With EMOE_NATIVE=0 in the environment the same by PyTorch's
operators. To be run alone on the machine, pinned to as many cores as there are threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from elastic_moe.cluster import placement as placements
from elastic_moe.cluster.messages.epochs import EpochSpec, ModelSpec, WorkerSpec
from elastic_moe.cluster.messages.steps import StepPlan
from elastic_moe.cluster.placement import Worker, WorkerId
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.worker.data_plane import DataPlane
from tests.bench.machine import floor_of, measure_machine, where_and_when
from tests.bench.workers import BLOCK, EPOCH, Case, Load

CONTEXT = 160
BATCHES = (1, 2, 4, 8, 16, 32)
PROMPTS = (128, 512, 2048)


def load_worker(
    path: Path, threads: int, *, dtype: str | None = None, expert_dtype: str = "auto", trunk_dtype: str = "auto"
) -> DataPlane:
    """The whole model on one worker. dtype: the stored one if not given."""
    info = open_checkpoint(str(path)).info
    member = Worker(id=WorkerId("w0"), node="n", slots=info.num_logical_experts)
    placement = placements.contiguous(info.num_layers, info.num_logical_experts, (member,))
    worker = DataPlane(
        WorkerSpec(
            worker=member.id,
            model=ModelSpec(
                path=str(path),
                dtype=dtype or info.dtype,
                device="cpu",
                max_model_len=min(4096, info.max_model_len),
                expert_dtype=expert_dtype,
                trunk_dtype=trunk_dtype,
            ),
            experts=tuple(placement.experts_of(member.id, layer) for layer in range(info.num_layers)),
            # much, so that windows of many sequences have blocks; no more memory is taken than is written to
            kv_cache_bytes=1 << 33,
            block_size=BLOCK,
            max_num_seqs=64,
            max_num_batched_tokens=max(max(BATCHES) * CONTEXT, *PROMPTS),
            num_threads=threads,
        )
    )
    worker.load()
    worker.prepare(EpochSpec(epoch=EPOCH, placement=placement, group="step", transport="local", rendezvous=""))
    worker.commit(EPOCH)
    return worker


def step_s(worker: DataPlane, plan: StepPlan) -> float:
    begin = time.perf_counter()
    worker.step(plan)
    return time.perf_counter() - begin


def decode_s(worker: DataPlane, batch: int, vocabulary: int, steps: int = 24) -> float:
    load = Load(
        Case(requests=batch, context=CONTEXT, steps=steps, most_requests=batch), 0, 0, 1, vocabulary, worker.window_room
    )
    worker.step(load.prefill())
    return statistics.median([step_s(worker, load.decode()) for _ in range(steps)][2:])


def prefill_s(worker: DataPlane, tokens: int, vocabulary: int) -> float:
    load = Load(Case(requests=1, context=tokens, steps=0, most_requests=1), 0, 0, 1, vocabulary, worker.window_room)
    return statistics.median([step_s(worker, load.prefill()) for _ in range(4)][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--expert-dtype", default="auto")
    parser.add_argument("--trunk-dtype", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    floor = floor_of(args.model, args.expert_dtype, args.trunk_dtype)
    machine = measure_machine(read_bytes=floor.weight_bytes)
    vocabulary = open_checkpoint(args.model).info.vocab_size
    worker = load_worker(args.model, args.threads, expert_dtype=args.expert_dtype, trunk_dtype=args.trunk_dtype)
    print(", ".join(f"{key} {value}" for key, value in where_and_when().items()))
    print(
        f"{args.threads} threads read {machine.read_gb_per_s:.0f} GB/s, multiply {machine.gemm_gflop_per_s:.0f} GFLOP/s"
    )
    print(f"served by {worker.report.text()}\n")
    print("| step | ms | tokens/s | share of the floor |\n|---|---|---|---|")
    for batch in BATCHES:
        seconds = decode_s(worker, batch, vocabulary)
        share = f"{floor.decode_step_ms(batch, CONTEXT, machine) / seconds / 10:.0f} %"
        print(f"| decode of {batch} | {seconds * 1e3:.1f} | {batch / seconds:.0f} | {share} |")
    for tokens in PROMPTS:
        seconds = prefill_s(worker, tokens, vocabulary)
        share = f"{100 * tokens / seconds / floor.prefill_tokens_per_s(machine):.0f} %"
        print(f"| prompt of {tokens} | {seconds * 1e3:.0f} | {tokens / seconds:.0f} | {share} |")


if __name__ == "__main__":
    main()
