"""Runs a process under a limit on its memory, page cache included: in a cgroup of either version.

It needs the right to make a cgroup, as root has it, and a kernel whose memory controller is mounted.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_V2 = Path("/sys/fs/cgroup")
_V1 = Path("/sys/fs/cgroup/memory")
_LEAVE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGroup:
    """A cgroup. Processes that `prefix` starts are in it, with all that they start."""

    directory: Path
    version: int

    @property
    def prefix(self) -> Sequence[str]:
        """What to put before a command line."""
        return ["/bin/sh", "-c", f'echo $$ > "{self.directory}/cgroup.procs" && exec "$@"', "sh"]

    def limit(self, nbytes: int) -> None:
        """Let its processes have so many bytes, page cache included. What is too much is reclaimed at once."""
        names = ("memory.max",) if self.version == 2 else ("memory.limit_in_bytes",)
        for name in names:
            (self.directory / name).write_text(str(nbytes))

    @property
    def anonymous_bytes(self) -> int:
        """Memory that no file stands behind."""
        name = "anon" if self.version == 2 else "total_rss"
        lines = (self.directory / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[0] == name)

    @property
    def pids(self) -> list[int]:
        return [int(pid) for pid in (self.directory / "cgroup.procs").read_text().split()]


def _refusal() -> str | None:
    if os.geteuid() != 0:
        return "only root may make a cgroup"
    return None if _version() else "no memory controller of cgroups is mounted"


def _version() -> int | None:
    with suppress(OSError):
        if "memory" in (_V2 / "cgroup.subtree_control").read_text().split():
            return 2
    return 1 if (_V1 / "memory.limit_in_bytes").exists() else None


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """A cgroup without a limit yet. Its processes must have ended when the block is left.

    Raises RuntimeError if this machine does not let us make one.
    """
    if (why := _refusal()) is not None:
        raise RuntimeError(f"memory cannot be limited: {why}")
    version = _version()
    assert version is not None
    directory = (_V2 if version == 2 else _V1) / f"emoe-bench-{uuid.uuid4().hex[:8]}"
    try:
        directory.mkdir()
    except OSError as error:
        raise RuntimeError(f"memory cannot be limited: {directory}: {error.strerror}") from error
    group = MemoryGroup(directory=directory, version=version)
    try:
        yield group
    finally:
        end = time.monotonic() + _LEAVE_S
        while group.pids and time.monotonic() < end:
            time.sleep(0.1)
        with suppress(OSError):
            directory.rmdir()
