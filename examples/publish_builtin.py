"""Measure the trained built-in model and put it, its traces and its card where the package has them.

    python -m examples.publish_builtin --trained build/builtin --out deploy/models/emoe-mini

Every figure and every sample in the card comes from here or from train_builtin.py's training.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from elastic_moe.cluster.setting import path_flag


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trained", type=path_flag, default=Path("build/builtin"), metavar="DIR",
        help="what train_builtin.py has made (build/builtin)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path_flag, default=Path("deploy/models/emoe-mini"), metavar="DIR",
        help="folder for the model, its traces and its card (deploy/models/emoe-mini)",
    )  # fmt: skip
    parser.add_argument("--note", default="", help="what the card shall say of the training besides (nothing)")
    args = parser.parse_args()
    if not (args.trained / "training.json").is_file():
        parser.error(f"--trained: there is no training.json in {args.trained}; examples.train_builtin makes it")
    # PyTorch takes seconds to import, which --help and mistakes need not wait for
    from examples.publishing import publish

    publish(args.trained, args.out, args.note)


if __name__ == "__main__":
    main()
