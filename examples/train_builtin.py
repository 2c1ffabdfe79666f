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

from elastic_moe.cluster.setting import DAY_S, number_flag, path_flag


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=number_flag(float, 0.01, 1e6), default=90, help="time to train, pauses not included (90)"
    )
    parser.add_argument(
        "--out",
        type=path_flag,
        default=Path("build/builtin"),
        metavar="DIR",
        help="folder for the model (build/builtin)",
    )
    parser.add_argument(
        "--processes", type=number_flag(int, 1, 4096), default=os.cpu_count(), help="number of processes (one per core)"
    )
    parser.add_argument(
        "--save-every-s", type=number_flag(float, 0, DAY_S), default=180, help="seconds between two checkpoints (180)"
    )
    parser.add_argument(
        "--measure-every-s", type=number_flag(float, 0, DAY_S), default=300,
        help="seconds between two measurements of the loss on held-out text (300)",
    )  # fmt: skip
    args = parser.parse_args()
    # PyTorch takes seconds to import, which --help and mistakes need not wait for
    from examples.training import train

    train(args)


if __name__ == "__main__":
    main()
