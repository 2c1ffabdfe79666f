"""The processes below this one: keeps them together with the kernel's help, and ends them.

On Linux a process can ask to become the parent of every descendant whose own parent dies. So whatever a server starts
stays below its supervisor, which may kill exactly the processes below itself; no process is searched for by its name.
On other systems, a descendant whose parent has died is not found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent dies from now on."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent, whose pid is `parent`, ends; exit if it has ended
    already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end_descendants(timeout_s: float = 10.0) -> list[int]:
    """Kill and reap all processes below this one. Returns the pids of those that are left after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while found := _descendants():
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        reap()
        if time.monotonic() > deadline:
            return [process.pid for process in found]
        time.sleep(0.02)
    return []


def reap() -> dict[int, int]:
    """The wait status, by pid, of each child that has ended since the last call. Does not block."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = status
    return ended


def lives(process: psutil.Process) -> bool:
    """Whether the process still runs. A zombie, which nobody has reaped yet, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _descendants() -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process().children(recursive=True)
    return []


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")
