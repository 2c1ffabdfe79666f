"""What Ray runs once, in a process that is no actor's."""

from __future__ import annotations

import contextlib

import psutil


def kill_process(pid: int) -> None:
    """End a worker's process. The process may be gone already and its number in use by another program."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if "WorkerActor" in " ".join(process.cmdline()):
            process.kill()
