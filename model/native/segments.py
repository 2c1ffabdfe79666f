"""Memory segments that the processes of a node share. Each rank makes one, and opens those of the other ranks.

A segment's name is removed when every rank has opened it. The kernel frees the memory when the last process has ended.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from elastic_moe.cluster.errors import StepAborted

DIRECTORY = Path("/dev/shm")


def join(
    group: str,
    rank: int,
    size: int,
    num_bytes: int,
    timeout_s: float,
    meet: Callable[[Sequence[mmap.mmap]], None],
) -> None:
    """Make this rank's segment, open those of the others, and call `meet` with all of them.

    `meet` must return when every rank has opened all segments. Raises StepAborted if a peer does not join within
    `timeout_s`, or if /dev/shm has no room.
    """
    paths = [DIRECTORY / f"{group}-{r}" for r in range(size)]
    own = _create(paths[rank], num_bytes)
    deadline = time.monotonic() + timeout_s
    try:
        meet([own if r == rank else _open(path, num_bytes, deadline) for r, path in enumerate(paths)])
    finally:
        paths[rank].unlink(missing_ok=True)


def _create(path: Path, num_bytes: int) -> mmap.mmap:
    # the file has another name until it is complete, since peers open it as soon as they see it
    building = path.with_name(path.name + "-new")
    fd = os.open(building, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        # the memory is reserved now, so that a full /dev/shm is an error here and not a SIGBUS within a step
        os.posix_fallocate(fd, 0, num_bytes)
        memory = mmap.mmap(fd, num_bytes)
    except OSError as error:
        building.unlink()
        raise StepAborted(f"{DIRECTORY} has no room for {num_bytes >> 20} MiB: {error.strerror}") from None
    finally:
        os.close(fd)
    building.rename(path)
    return memory


def _open(path: Path, num_bytes: int, deadline: float) -> mmap.mmap:
    while True:
        try:
            fd = os.open(path, os.O_RDWR)
            break
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise StepAborted(f"peer {path.name} did not join") from None
            time.sleep(0.002)
    try:
        return mmap.mmap(fd, num_bytes)
    finally:
        os.close(fd)
