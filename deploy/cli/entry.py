"""The entry point of the command `emoe`: Ctrl-C prints no traceback, not even during imports or after the end.

Files and names are in UTF-8, whatever the locale.
"""

from __future__ import annotations

import locale
import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGINT, _leave)
    prefer_utf8()
    from elastic_moe.deploy.cli import main as cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return cli.main()
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def prefer_utf8() -> None:
    """Where Python would open files in another encoding, run this command again in its UTF-8 mode, which all processes
    that it starts inherit. Serve writes HAProxy's configuration as the locale says, and has more than ASCII in it."""
    if locale.getencoding().lower() not in ("utf-8", "utf8") and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _leave(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)
