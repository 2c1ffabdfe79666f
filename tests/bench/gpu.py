"""This project's data plane against transformers' continuous batching, on one GPU, in one process, without HTTP.

    python -m tests.bench.gpu [--model DIR] [--concurrency 1,8,32,128] [--out DIR]

Both run the same checkpoint (the random "mid" of the serving benchmark, if none is given) in its own dtype and answer
the same random prompts greedily, four for each place in the batch, all handed in at once; a smaller load warms up. Ours
is the scheduler and one worker, two steps in flight, transformers' is `generate_batch` with its own defaults. Writes
gpu.json and gpu.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from tests.bench.machine import where_and_when
from tests.bench.report import markdown
from tests.bench.serving import mid_checkpoint
from tests.model.lockstep import Lockstep, request

PROMPT_TOKENS, OUTPUT_TOKENS, PER_PLACE = 128, 64, 4
LONG_PROMPTS, LONG_TOKENS = 12, 1024
"""The load that measures prefill: one output token each."""
STEP_TOKENS = 8192

Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts, int], int]
"""Answer all prompts with so many tokens each. Returns the number of tokens that came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    server: str
    concurrency: int
    """0: the prefill load."""
    tokens: int
    """Number of output tokens; in the prefill load, of prompt tokens."""
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@contextmanager
def ours(path: Path, dtype: str, device: str, concurrency: int) -> Iterator[Generate]:
    cluster = Lockstep(
        path,
        [open_checkpoint(path).info.num_logical_experts],
        dtype=dtype,
        device=device,
        max_model_len=LONG_TOKENS + OUTPUT_TOKENS,
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=concurrency,
        block_size=16,
    )
    turns = iter(range(1 << 30))

    def generate(prompts: Prompts, tokens: int) -> int:
        turn = next(turns)
        requests = [request(f"{turn}-{n}", prompt, max_tokens=tokens) for n, prompt in enumerate(prompts)]
        return sum(len(answer) for answer in cluster.run(requests, most_steps=1 << 30).values())

    [worker] = cluster.workers.values()
    print(f"ours is served by: {worker.report.summary()}", flush=True)
    yield generate


@contextmanager
def theirs(path: Path, dtype: str, device: str, concurrency: int) -> Iterator[Generate]:
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
    options: dict[str, Any] = {}
    try:
        from transformers import ContinuousBatchingConfig

        if "max_requests_per_batch" in {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}:
            options["continuous_batching_config"] = ContinuousBatchingConfig(max_requests_per_batch=concurrency)
    except ImportError:  # an older version, which has no such setting
        pass

    def generate(prompts: Prompts, tokens: int) -> int:
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
        answers = model.generate_batch(inputs=[list(p) for p in prompts], generation_config=config, **options)
        return sum(len(answer.generated_tokens) for answer in answers.values())

    yield generate


SERVERS = {"elastic-moe, one worker": ours, "transformers, continuous batching": theirs}


def measure(server: str, path: Path, dtype: str, device: str, concurrency: Sequence[int], seed: int) -> list[Result]:
    """Every load on a server that is made for it. Raises RuntimeError where tokens are missing."""
    vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]
    rng = random.Random(seed)

    def draw(count: int, length: int) -> Prompts:
        return [[rng.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]

    def timed(generate: Generate, prompts: Prompts, tokens: int) -> float:
        begin = time.perf_counter()
        came = generate(prompts, tokens)
        if came != len(prompts) * tokens:
            raise RuntimeError(f"{server}: {came} tokens came, {len(prompts) * tokens} were asked for")
        return time.perf_counter() - begin

    found = []
    for places in concurrency:
        with SERVERS[server](path, dtype, device, places) as generate:
            timed(generate, draw(places, PROMPT_TOKENS), OUTPUT_TOKENS)
            seconds = timed(generate, draw(PER_PLACE * places, PROMPT_TOKENS), OUTPUT_TOKENS)
        tokens = PER_PLACE * places * OUTPUT_TOKENS
        found.append(Result(server=server, concurrency=places, tokens=tokens, seconds=seconds))
        print(f"{server}, {places} at a time: {found[-1].tokens_per_s:.0f} tokens/s", flush=True)
        free()
    with SERVERS[server](path, dtype, device, LONG_PROMPTS) as generate:
        timed(generate, draw(2, LONG_TOKENS), 1)
        seconds = timed(generate, draw(LONG_PROMPTS, LONG_TOKENS), 1)
    found.append(Result(server=server, concurrency=0, tokens=LONG_PROMPTS * LONG_TOKENS, seconds=seconds))
    free()
    return found


def free() -> None:
    """Return the memory of the last server to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(results: Sequence[Result]) -> str:
    loads = sorted({r.concurrency for r in results if r.concurrency})
    head = ("tokens per second", *(f"{n} at a time" for n in loads), "prefill")
    rates = {(r.server, r.concurrency): f"{r.tokens_per_s:.0f}" for r in results}
    rows = [[name, *(rates[name, n] for n in (*loads, 0))] for name in SERVERS]
    first, second = ([float(cell) for cell in row[1:]] for row in rows)
    rows.append(["ours over theirs", *(f"{a / b:.2f}" for a, b in zip(first, second, strict=True))])
    return markdown(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--concurrency", default="1,8,32,128")
    parser.add_argument("--device", default="cuda", help="cpu tries the script, its figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU and a torch built for it; there is none here", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.model or mid_checkpoint(args.out)
    dtype = open_checkpoint(path).info.dtype
    loads = [int(n) for n in args.concurrency.split(",")]
    about = where_and_when() | {"model": path.name, "dtype": dtype}
    about["device"] = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    results = [r for name in SERVERS for r in measure(name, path, dtype, args.device, loads, seed=0)]
    text = "; ".join(f"{name} {value}" for name, value in about.items()) + "\n\n" + table(results)
    (args.out / "gpu.md").write_text(text)
    (args.out / "gpu.json").write_text(json.dumps({"about": about, "results": [asdict(r) for r in results]}, indent=1))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
