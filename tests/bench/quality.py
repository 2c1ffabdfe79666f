"""Measures what narrow experts cost in quality: bits per byte of a text, and KL divergence from bfloat16 experts.

`python -m tests.bench.quality --model DIR FILE...` (without --model: the built-in one). The beginning of each file is
cut into windows. The model predicts every token of a window from the tokens before it, by the steps that serve
requests. A packed checkpoint is compared with itself unpacked (--forms auto).

`--formats NAME...` adds formats of 4 and 8 bits in which checkpoints are published. The experts are packed into them by
plain rounding, without the calibration that some publishers make (tests/model/packing.py has the names).

`--llama-cpp SOURCE` adds llama.cpp's formats of the same checkpoint (llama-perplexity --kl-divergence, over its own
bf16 form and windows of the same length). It rounds every matrix, where ours rounds the experts alone.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from elastic_moe.deploy.launch.builtin import MODEL_DIR
from elastic_moe.deploy.text.tokenizer import Tokenizer
from elastic_moe.model.trunk.step_batch import SequenceSlice
from elastic_moe.model.worker.data_plane import DataPlane
from tests.bench.servers import gguf_of, run_tool
from tests.bench.step import load_worker
from tests.bench.workers import BLOCK, dtypes
from tests.model.packing import CASES, pack_checkpoint

WINDOW = 160
WINDOWS = 32
"""Run side by side."""
PLAIN = "bfloat16"


def logprobs_of(worker: DataPlane, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """After each token of the windows, which are of equal length, but the last: [windows, vocabulary]."""
    length = len(windows[0])
    per_window = -(-length // BLOCK)
    for at in range(length - 1):
        slices = [
            SequenceSlice(
                token_ids=[window[at]],
                start=at,
                block_ids=list(range(n * per_window, (n + 1) * per_window)),
                prompt_length=length,
                wants_logits=True,
            )
            for n, window in enumerate(windows)
        ]
        with torch.inference_mode():
            logprobs = worker._runner.run(slices, [len(windows)]).float().log_softmax(dim=-1)
        yield logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a form of the experts, per token, over all tokens but each window's first."""

    bits: float
    kl: float
    """Nats of KL divergence from bfloat16 experts."""


def costs(workers: Sequence[DataPlane], windows: Sequence[Sequence[int]]) -> list[Cost]:
    """Of each worker. The first one has the experts that the others are compared with."""
    bits, kls = [0.0] * len(workers), [0.0] * len(workers)
    for at, rows in enumerate(zip(*(logprobs_of(worker, windows) for worker in workers), strict=True), 1):
        following = torch.tensor([window[at] for window in windows])[:, None]
        for n, row in enumerate(rows):
            bits[n] -= float(row.gather(1, following).sum())
            kls[n] += float((rows[0].exp() * (rows[0] - row)).sum())
    count = len(windows) * (len(windows[0]) - 1)
    return [Cost(bits=b / count / math.log(2), kl=k / count) for b, k in zip(bits, kls, strict=True)]


def of_llama_cpp(source: Path, model: Path, kind: str, text: str, out: Path) -> tuple[float, float]:
    """(per cent more bits, nats of KL divergence) per token than with llama.cpp's own bf16 form."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as path:
        prose, base = Path(path) / "text", Path(path) / "base"
        prose.write_text(text)
        common = ["-f", str(prose), "-c", str(WINDOW), "--kl-divergence-base", str(base)]
        run_tool(source, "llama-perplexity", "-m", str(gguf_of(source, model, out, "bf16")), *common)
        packed = str(gguf_of(source, model, out, kind))
        told = run_tool(source, "llama-perplexity", "-m", packed, *common, "--kl-divergence")
    plain, rounded = (math.log(_told(told, f"Mean PPL({which})")) for which in ("base", "Q"))
    return 100 * (rounded / plain - 1), _told(told, "Mean    KLD")


def _told(text: str, name: str) -> float:
    """The value that llama.cpp prints behind a name."""
    line = next(line for line in text.splitlines() if name in line)
    return float(line.split(":")[1].split()[0])


def in_formats(model: Path, names: Sequence[str], out: Path) -> list[Path]:
    """Copies of a checkpoint whose experts are in these formats."""
    cases = [replace(CASES[name], experts_only=True) for name in names]
    return [pack_checkpoint(model, out / name, case)[0] for name, case in zip(names, cases, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--forms",
        nargs="+",
        default=["int8", "int4"],
        help="values of --expert-dtype, and after a + of --trunk-dtype: int4+int8",
    )
    parser.add_argument("--formats", nargs="*", default=[], choices=CASES, help="formats of published checkpoints")
    parser.add_argument("--llama-cpp", type=Path, metavar="SOURCE", help="llama.cpp's source tree, built in build/")
    parser.add_argument("--llama-types", nargs="+", default=["q8_0", "q4_k_m"], help="its formats")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="where llama.cpp's files are kept")
    parser.add_argument("file", type=Path, nargs="+")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(str(args.model))
    names = [PLAIN, *args.forms]
    workers = [load_worker(args.model, args.threads, dtype="bfloat16", **dtypes(name)) for name in names]
    with tempfile.TemporaryDirectory() as packed:
        copies = in_formats(args.model, args.formats, Path(packed))
        workers += [load_worker(copy, args.threads, dtype="bfloat16") for copy in copies]
    names += args.formats
    print("| text | experts | bits per byte | difference | KL, nats per token |\n|---|---|---|---|---|")
    for path in args.file:
        text = path.read_text(errors="replace")[: 8 * WINDOWS * WINDOW]
        ids = tokenizer.encode(text)
        count = min(WINDOWS, len(ids) // WINDOW)
        windows = [ids[n * WINDOW : (n + 1) * WINDOW] for n in range(count)]
        per_byte = count * WINDOW / sum(len(tokenizer.decode(window).encode()) for window in windows)
        plain, *_ = found = costs(workers, windows)
        for name, cost in zip(names, found, strict=True):
            difference = 100 * (cost.bits / plain.bits - 1)
            print(f"| {path.name} | {name} | {cost.bits * per_byte:.4f} | {difference:+.2f} % | {cost.kl:.5f} |")
        for kind in args.llama_types if args.llama_cpp else ():
            difference, kl = of_llama_cpp(args.llama_cpp, args.model, kind, text, args.out)
            print(f"| {path.name} | llama.cpp {kind} | | {difference:+.2f} % | {kl:.5f} |")


if __name__ == "__main__":
    main()
