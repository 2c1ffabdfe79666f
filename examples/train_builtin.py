"""Train the built-in model from public text on CPU cores.

    python -m examples.train_builtin --minutes 90 --out build/builtin

Fetches the text, learns a byte-level BPE tokenizer, and trains a small Qwen3-MoE for the given time: one process per
core, each with batches of its own, gradients averaged after every step. A run that was stopped goes on where its last
checkpoint was. `--out` gets the model in Hugging Face layout (model/), training.json with losses, and loss.png.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90, help="time to train, pauses not included (default 90)")
    parser.add_argument("--out", type=Path, default=Path("build/builtin"))
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one per core")
    parser.add_argument("--save-every-s", type=float, default=180)
    parser.add_argument("--measure-every-s", type=float, default=300)
    args = parser.parse_args()
    # PyTorch takes seconds to import, which --help and mistakes need not wait for
    from examples.training import train

    train(args)


if __name__ == "__main__":
    main()
