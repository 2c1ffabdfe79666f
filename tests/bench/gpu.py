"""This project's data plane against transformers' continuous batching, on one GPU, in one process, without HTTP.

    python -m tests.bench.gpu [--model DIR] [--concurrency 1,8,32,128] [--prompts 1024,8192]
        [--expert-dtype bfloat16,int8,int4] [--alone] [--out DIR]

Both run the same checkpoint (a random Qwen3-MoE of 13 GB, if none is given) in its own dtype and answer the same random
prompts greedily. Decode: so many requests at a time with prompts of 128 tokens, the time of a step between the first
token and the last. Prefill: one prompt of each length, and 8192 tokens of the shorter ones in one step. Ours is the
scheduler and one worker, two steps in flight, with experts of each `--expert-dtype` in turn; transformers' is
`generate_batch` with its own defaults.

Beside each figure stands its share of the floor. In decode, that is the time to read what the step must read once, at
the rate of reading a large tensor: the matrices outside the experts, the experts that the step's tokens choose, which
are counted, in the bytes in which they are kept, and the keys and values. In prefill, it is the time of the products at
the rate of a large bfloat16 product. Writes gpu.json and gpu.md.
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
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from tests.bench.machine import where_and_when
from tests.bench.report import markdown
from tests.bench.wide import wide_checkpoint
from tests.model.lockstep import Lockstep, request

LAYERS = 16
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 65
STEP_TOKENS = 8192

Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts, int], int]
"""Answer all prompts with so many tokens each. Returns the number of tokens that came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    server: str
    load: str
    """`decode 32`, or `prefill 8x1024`."""
    seconds: float
    """Of a decode step, or of a prefill."""
    tokens: int
    """That came, or were read, in this time."""
    floor_s: float | None = None
    expert_dtype: str = "auto"
    """The setting of --expert-dtype."""
    expert_bytes: int = 0
    """Bytes of an expert as it is kept."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the device reaches."""

    read_bytes_per_s: float
    flop_per_s: float
    """Of a product of matrices of 8192 by 8192 in bfloat16."""


def measure_rates() -> Rates:
    big = torch.randn(1 << 29, device="cuda")
    read_s = _seconds(lambda: big.sum())
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return Rates(read_bytes_per_s=big.nbytes / read_s, flop_per_s=2 * 8192**3 / _seconds(lambda: a @ b))


def _seconds(run: Callable[[], Any], times: int = 20) -> float:
    """Of one run, by the device's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        run()
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / times


class Ours:
    """One worker, which is loaded once."""

    name = "elastic-moe, one worker"

    def __init__(
        self, path: Path, dtype: str, device: str, concurrency: int, length: int, expert_dtype: str = "auto"
    ) -> None:
        info = open_checkpoint(path).info
        self.cluster = Lockstep(
            path,
            [info.num_logical_experts],
            dtype=dtype,
            expert_dtype=expert_dtype,
            device=device,
            max_model_len=max(length, PROMPT_TOKENS) + OUTPUT_TOKENS,
            max_num_batched_tokens=STEP_TOKENS,
            max_num_seqs=concurrency,
            block_size=16,
            prefix_caching=False,
            kv_cache_bytes=16 << 30 if device == "cuda" else None,
        )
        [self.worker] = self.cluster.workers.values()
        self._turns = iter(range(1 << 30))
        print(f"ours is served by: {self.worker.report.summary()}", flush=True)

    def generate(self, prompts: Prompts, tokens: int) -> int:
        turn = next(self._turns)
        requests = [request(f"{turn}-{n}", prompt, max_tokens=tokens) for n, prompt in enumerate(prompts)]
        return sum(len(answer) for answer in self.cluster.run(requests, most_steps=1 << 30).values())

    def active_experts(self, prompts: Prompts) -> float:
        """Experts of a layer that a decode step of these prompts chooses: the mean over layers and three steps."""
        counter, note, seen = self.worker._counter, self.worker._counter.note, list[Tensor]()
        counter.note = lambda index_LTK: (seen.append(index_LTK.clone()), note(index_LTK))[1]  # type: ignore[method-assign]
        try:
            self.generate(prompts, 4)
        finally:
            counter.note = note  # type: ignore[method-assign]
        layers = self.worker.loaded.store.num_layers
        steps = [
            len(set(row.flatten().tolist()))
            for index in seen
            if index.shape[:2] == (layers, len(prompts))
            for row in index
        ]
        return sum(steps) / max(1, len(steps))

    @property
    def expert_bytes(self) -> int:
        """Bytes of an expert as it is kept."""
        store = self.worker.loaded.store
        return store.nbytes // sum(len(store.held(layer)) for layer in range(store.num_layers))

    def decode_floor_s(self, rates: Rates, active: float, keys: int) -> float:
        """Of a step that reads so many experts of each layer, and so many keys in all."""
        loaded = self.worker.loaded
        store, shapes = loaded.store, self.worker._runner.kv_shapes
        trunk: Any = self.worker._runner._trunk
        outside = sum(p.nbytes for name, p in trunk.named_parameters() if "embed" not in name)
        kv = sum(shape.elements for shape in shapes.values()) * 2 * keys
        return (outside + active * store.num_layers * self.expert_bytes + kv) / rates.read_bytes_per_s

    def prefill_floor_s(self, rates: Rates, prompts: int, length: int) -> float:
        """Of products with matrices, and of queries and values with the keys that they see."""
        loaded = self.worker.loaded
        info, config = loaded.memory.info, self.worker._runner._trunk.config
        trunk: Any = self.worker._runner._trunk
        outside = sum(
            p.numel() for name, p in trunk.named_parameters() if "embed" not in name and "lm_head" not in name
        )
        experts = info.num_layers * config.num_experts_per_tok * info.served_in("bfloat16").expert_bytes / 2
        heads = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        attention = 2 * info.num_layers * heads * length * (length + 1)
        return prompts * (2 * length * (outside + experts) + attention) / rates.flop_per_s


@contextmanager
def theirs(path: Path, dtype: str, device: str) -> Iterator[Any]:
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
    yield model


def generate_by(model: Any, concurrency: int) -> Generate:
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

    return generate


def timed(generate: Generate, prompts: Prompts, tokens: int) -> float:
    """Seconds. Raises RuntimeError where tokens are missing."""
    begin = time.perf_counter()
    came = generate(prompts, tokens)
    if came != len(prompts) * tokens:
        raise RuntimeError(f"{came} tokens came, {len(prompts) * tokens} were asked for")
    return time.perf_counter() - begin


class Draw:
    """Random prompts, the same for both servers."""

    def __init__(self, path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        self._vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
        self._rng = random.Random(0)

    def __call__(self, count: int, length: int) -> Prompts:
        return [[self._rng.randrange(3, self._vocabulary) for _ in range(length)] for _ in range(count)]


def decode_s(generate: Generate, draw: Draw, places: int, tokens: int) -> float:
    """Seconds of one step. Prompt and first token are taken off: their time is that of an answer of one token."""
    timed(generate, draw(places, PROMPT_TOKENS), 3)
    first = timed(generate, draw(places, PROMPT_TOKENS), 1)
    return (timed(generate, draw(places, PROMPT_TOKENS), tokens) - first) / (tokens - 1)


def measure_ours(
    path: Path,
    dtype: str,
    device: str,
    concurrency: Sequence[int],
    lengths: Sequence[int],
    *,
    rates: Rates,
    expert_dtype: str,
) -> list[Result]:
    ours, draw = Ours(path, dtype, device, max(concurrency), max(lengths), expert_dtype), Draw(path)
    found: list[Result] = []
    print(f"an expert takes {ours.expert_bytes} bytes", flush=True)

    def add(load: str, seconds: float, tokens: int, floor_s: float) -> None:
        found.append(
            Result(
                server=ours.name,
                load=load,
                seconds=seconds,
                tokens=tokens,
                floor_s=floor_s,
                expert_dtype=expert_dtype,
                expert_bytes=ours.expert_bytes,
            )
        )
        rate, share, about = found[-1].tokens_per_s, floor_s / seconds, f"{expert_dtype}, {load}"
        print(f"ours, {about}: {seconds * 1e3:.2f} ms, {rate:.0f} tokens/s, {share:.2f} of the floor", flush=True)

    for places in concurrency:
        active = ours.active_experts(draw(places, PROMPT_TOKENS))
        step_s = decode_s(ours.generate, draw, places, OUTPUT_TOKENS)
        keys = places * (PROMPT_TOKENS + OUTPUT_TOKENS // 2)
        add(f"decode {places}", step_s, places, ours.decode_floor_s(rates, active, keys))
    for count, length in prefills(lengths):
        timed(ours.generate, draw(count, length), 1)
        seconds = min(timed(ours.generate, draw(count, length), 1) for _ in range(3))
        add(f"prefill {count}x{length}", seconds, count * length, ours.prefill_floor_s(rates, count, length))
    return found


def prefills(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(prompts, tokens of each): one prompt, and a step full of them where it holds several."""
    return [(count, length) for length in lengths for count in sorted({1, max(1, STEP_TOKENS // length)})]


def measure_theirs(
    path: Path, dtype: str, device: str, concurrency: Sequence[int], lengths: Sequence[int]
) -> list[Result]:
    draw, found, name = Draw(path), [], "transformers, continuous batching"

    def add(load: str, seconds: float, tokens: int) -> None:
        found.append(Result(server=name, load=load, seconds=seconds, tokens=tokens))
        print(f"transformers, {load}: {seconds * 1e3:.2f} ms, {found[-1].tokens_per_s:.0f} tokens/s", flush=True)

    with theirs(path, dtype, device) as model:
        for places in concurrency:
            add(f"decode {places}", decode_s(generate_by(model, places), draw, places, 17), places)
        for count, length in prefills(lengths):
            generate = generate_by(model, count)
            timed(generate, draw(count, length), 1)
            add(f"prefill {count}x{length}", timed(generate, draw(count, length), 1), count * length)
    return found


def free() -> None:
    """Return the memory of the last server to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(ours: Sequence[Result], others: Sequence[Result]) -> str:
    other = {result.load: result for result in others}
    rows = []
    for mine in ours:
        share = "" if mine.floor_s is None else f"{mine.floor_s / mine.seconds:.0%}"
        their = other.get(mine.load)
        last = ["", ""] if their is None else [f"{their.tokens_per_s:.0f}", f"{their.seconds / mine.seconds:.1f}"]
        rows.append(
            [mine.expert_dtype, mine.load, f"{mine.seconds * 1e3:.2f}", f"{mine.tokens_per_s:.0f}", share, *last]
        )
    return markdown(
        ("experts", "load", "ms", "tokens/s", "of the floor", "transformers' tokens/s", "times theirs"), rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--concurrency", default="1,8,32,128")
    parser.add_argument("--prompts", default="1024,8192", help="tokens of the prompts of the prefill loads")
    parser.add_argument("--device", default="cuda", help="cpu tries the script, its figures mean nothing")
    parser.add_argument(
        "--expert-dtype", default="auto", help="auto, bfloat16, int8 or int4; several are measured one after another"
    )
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU and a torch built for it; there is none here", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.model or wide_checkpoint(args.out / "wide", layers=LAYERS, device=args.device)
    dtype = open_checkpoint(path).info.dtype
    loads, lengths = ([int(n) for n in text.split(",")] for text in (args.concurrency, args.prompts))
    about = where_and_when() | {"model": path.name, "dtype": dtype}
    about["device"] = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    rates = measure_rates() if args.device == "cuda" else Rates(read_bytes_per_s=1.0, flop_per_s=1.0)
    print(
        f"reads {rates.read_bytes_per_s / 1e12:.2f} TB/s, multiplies {rates.flop_per_s / 1e12:.0f} TFLOP/s", flush=True
    )
    ours: list[Result] = []
    for form in args.expert_dtype.split(","):
        ours += measure_ours(path, dtype, args.device, loads, lengths, rates=rates, expert_dtype=form)
        free()
    others = [] if args.alone else measure_theirs(path, dtype, args.device, loads, lengths)
    text = "; ".join(f"{name} {value}" for name, value in about.items()) + "\n\n" + table(ours, others)
    (args.out / "gpu.md").write_text(text)
    found = {"about": about, "results": [asdict(r) for r in (*ours, *others)]}
    (args.out / "gpu.json").write_text(json.dumps(found, indent=1))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
