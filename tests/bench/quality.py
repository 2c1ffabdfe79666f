"""Measures what 8-bit experts cost in quality: bits per byte of a text on one worker, with and without them.

`python -m tests.bench.quality --model DIR FILE...` (without --model: the built-in one). The beginning of each file is
cut into windows. The model predicts every token of a window from the tokens before it, by the steps that serve
requests.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from elastic_moe.deploy.launch.builtin import MODEL_DIR
from elastic_moe.deploy.text.tokenizer import Tokenizer
from elastic_moe.model.trunk.attention import SequenceSlice
from elastic_moe.model.worker.worker import Worker
from tests.bench.step import load_worker
from tests.bench.workers import BLOCK

WINDOW = 160
WINDOWS = 32
"""Run side by side."""


def bits_per_token(worker: Worker, windows: Sequence[Sequence[int]]) -> float:
    """Mean over all tokens but each window's first. Windows are of equal length."""
    length = len(windows[0])
    per_window = -(-length // BLOCK)
    total = 0.0
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
        following = torch.tensor([window[at + 1] for window in windows])
        total -= float(logprobs.gather(1, following[:, None]).sum())
    return total / math.log(2) / len(windows) / (length - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("file", type=Path, nargs="+")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(str(args.model))
    texts = {}
    for path in args.file:
        ids = tokenizer.encode(path.read_text(errors="replace")[: 8 * WINDOWS * WINDOW])
        count = min(WINDOWS, len(ids) // WINDOW)
        windows = [ids[n * WINDOW : (n + 1) * WINDOW] for n in range(count)]
        size = sum(len(tokenizer.decode(window).encode()) for window in windows)
        texts[path.name] = windows, count * WINDOW / size
    workers = {
        name: load_worker(args.model, args.threads, dtype="bfloat16", expert_dtype=name) for name in ("auto", "int8")
    }
    print("| text | bits per byte, bfloat16 | with int8 experts | difference |\n|---|---|---|---|")
    for name, (windows, tokens_per_byte) in texts.items():
        plain, rounded = (tokens_per_byte * bits_per_token(worker, windows) for worker in workers.values())
        print(f"| {name} | {plain:.4f} | {rounded:.4f} | {100 * (rounded / plain - 1):+.2f} % |")


if __name__ == "__main__":
    main()
