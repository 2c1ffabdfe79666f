"""Measure the trained built-in model and put it, its traces and its card where the package has them.

    python -m examples.publish_builtin --trained build/builtin --out deploy/models/emoe-mini

Every figure and every sample in the card comes from here or from train_builtin.py's training.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, default=Path("build/builtin"))
    parser.add_argument("--out", type=Path, default=Path("deploy/models/emoe-mini"))
    parser.add_argument("--note", default="", help="what the card shall say of the training besides")
    args = parser.parse_args()
    # PyTorch takes seconds to import, which --help and mistakes need not wait for
    from examples.publishing import publish

    publish(args.trained, args.out, args.note)


if __name__ == "__main__":
    main()
