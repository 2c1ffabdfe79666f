"""The entry point of the command `emoe`: Ctrl-C prints no traceback, not even during imports or after the end."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGINT, _leave)
    from elastic_moe.deploy.cli import main as cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return cli.main()
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)
