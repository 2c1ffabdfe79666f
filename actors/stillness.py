"""Whether a process of ours stands still: it is stopped (SIGSTOP, a debugger), or blocked for good.

Whoever waits for a helper process looks at it meanwhile. Time alone says nothing on a busy machine: a process that
works uses the processor, waits for it, or brings in pages, however slowly. One that does none of this for long is
ended, and whoever has waited starts another one. Linux reports all this; elsewhere no process is found to stand still.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from elastic_moe.actors.liveness import BLOCKED_S, HELPER_LOOK_S, STOPPED_S

T = TypeVar("T")

TRIES = 3
"""Processes that are asked one after another, where each stands still."""
_STATE, _MINOR_FAULTS, _MAJOR_FAULTS, _USER_TICKS, _SYSTEM_TICKS, _BORN = 0, 7, 9, 11, 12, 19
"""Places in /proc/PID/stat, after the name of the process."""


class StandsStill(Exception):
    """The process that was waited for does nothing. The text says why that is thought."""


@dataclass(slots=True)
class Watch:
    """Looks at a process while somebody waits for it. Make it while the process lives for certain.

    Time is counted in looks: while whoever waits is stopped too, none passes.
    """

    pid: int
    processor_s: float | None = None
    """Processor time after which it has taken too long; None: somebody else limits that."""
    may_wait: bool = False
    """It may wait for a process of its own: only one that is stopped stands still."""
    _born: str = ""
    _done: tuple[int, ...] = ()
    _used_s: float = 0.0
    _stopped: int = 0
    _blocked: int = 0

    def __post_init__(self) -> None:
        fields = _fields(f"/proc/{self.pid}/stat")
        self._born = fields[_BORN] if fields else ""
        self._used_s = _processor_s(fields) if fields else 0.0

    def begin(self) -> None:
        """Somebody begins to wait."""
        self._stopped = self._blocked = 0

    def look(self) -> None:
        """Call this every HELPER_LOOK_S while you wait. Raises StandsStill, and TimeoutError where the process
        has needed more than `processor_s`."""
        fields = _fields(f"/proc/{self.pid}/stat")
        if fields is None or fields[_BORN] != self._born:
            # it has ended, which its connection will tell
            return
        if self.processor_s is not None and _processor_s(fields) - self._used_s > self.processor_s:
            raise TimeoutError(f"it needs more than {self.processor_s:.0f} s of processor time")
        states = _states(self.pid)
        done = tuple(int(fields[place]) for place in (_USER_TICKS, _SYSTEM_TICKS, _MINOR_FAULTS, _MAJOR_FAULTS))
        self._stopped = self._stopped + 1 if states <= {"T", "t"} else 0
        works = done != self._done or "R" in states or self.may_wait
        self._blocked = 0 if works else self._blocked + 1
        self._done = done
        if self._stopped * HELPER_LOOK_S >= STOPPED_S:
            raise StandsStill(f"process {self.pid} has been stopped for {STOPPED_S:g} s")
        if self._blocked * HELPER_LOOK_S >= BLOCKED_S:
            raise StandsStill(f"process {self.pid} has done nothing for {BLOCKED_S:g} s")

    def kill(self) -> None:
        """End the process, if it lives."""
        fields = _fields(f"/proc/{self.pid}/stat")
        if fields is not None and fields[_BORN] == self._born:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


@contextlib.contextmanager
def until_left(work: Awaitable[T]) -> Iterator[asyncio.Future[T]]:
    """`work` as a task that is cancelled where the block is left before the task is done."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        if not task.done():
            task.cancel()
        elif not task.cancelled():
            # it may have failed while the block was being cancelled
            task.exception()


async def while_it_works(work: Awaitable[T], watch: Watch) -> T:
    """The result of `work`, which waits for the process of `watch`. Raises StandsStill, and cancels `work`."""
    watch.begin()
    with until_left(work) as task:
        while not (await asyncio.wait([task], timeout=HELPER_LOOK_S))[0]:
            watch.look()
        return task.result()


@dataclass(slots=True)
class Ended:
    """Why the process was ended; None while it has not been."""

    why: StandsStill | TimeoutError | None = None


@contextlib.contextmanager
def ended_if_still(
    process: subprocess.Popen[bytes], *, processor_s: float | None = None, may_wait: bool = False
) -> Iterator[Ended]:
    """While the block waits for the process, a thread looks at it, and kills it if it stands still, or needs too much.

    The arguments are as in Watch. Then the other ends of its pipes close, which ends whoever reads them.
    """
    watch, over, ended = Watch(process.pid, processor_s=processor_s, may_wait=may_wait), threading.Event(), Ended()

    def look() -> None:
        while not over.wait(HELPER_LOOK_S):
            try:
                watch.look()
            except (StandsStill, TimeoutError) as why:
                ended.why = why
                process.kill()
                return

    looking = threading.Thread(target=look, name="stillness", daemon=True)
    looking.start()
    try:
        yield ended
    finally:
        over.set()
        looking.join()


def _fields(path: str) -> list[str] | None:
    """What a stat file says after the name; None where the process or thread is gone, or the system has no such."""
    try:
        return Path(path).read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _processor_s(fields: list[str]) -> float:
    return (int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])) / os.sysconf("SC_CLK_TCK")


def _states(pid: int) -> set[str]:
    """Of the process's living threads: R runs or may run, S and D wait, T and t are stopped."""
    try:
        threads = [_fields(f"/proc/{pid}/task/{thread}/stat") for thread in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return {"R"}
    return {fields[_STATE] for fields in threads if fields} - {"Z", "X", "x"} or {"R"}
