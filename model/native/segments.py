"""Memory segments that the processes of a node share. Each rank makes one, and opens those of the other ranks.

A segment's name is removed when every rank has opened it. The kernel frees the memory when the last process has ended.
While it has a name, its rank holds a lock on the file. So a file that nobody has locked was left behind by a rank that
was killed, and `remove_stale` removes it: those of any server of this user, since no other one can be locked out.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.cluster.lines import size_text

DIRECTORY = Path("/dev/shm")
_SUFFIX = ".emoe-segment"


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
    paths = [DIRECTORY / f"{group}-{r}{_SUFFIX}" for r in range(size)]
    own, lock = _create(paths[rank], num_bytes)
    deadline = time.monotonic() + timeout_s
    try:
        meet([own if r == rank else _open(path, num_bytes, deadline) for r, path in enumerate(paths)])
    finally:
        paths[rank].unlink(missing_ok=True)
        os.close(lock)


def remove_stale() -> None:
    """Remove the files that killed ranks have left behind, whatever group and server they belonged to."""
    with contextlib.suppress(OSError):
        for path in DIRECTORY.glob(f"*{_SUFFIX}"):
            # another user's, or somebody else removes it, or its rank lives
            with contextlib.suppress(OSError):
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the name may be that of another file by now; only who has its lock gives or takes the name of a file
        if os.path.samestat(os.stat(path), os.fstat(fd)):
            path.unlink()
    finally:
        os.close(fd)


def _create(path: Path, num_bytes: int) -> tuple[mmap.mmap, int]:
    """The segment, and the descriptor that holds its lock."""
    # the file has another name until it is complete, since peers open it as soon as they see it
    building = path.with_name(f"{path.stem}-new{_SUFFIX}")
    fd = _create_locked(building)
    try:
        # the memory is reserved now, so that a full /dev/shm is an error here and not a SIGBUS within a step
        os.posix_fallocate(fd, 0, num_bytes)
        memory = mmap.mmap(fd, num_bytes)
        building.rename(path)
    except OSError as error:
        building.unlink(missing_ok=True)
        os.close(fd)
        raise StepAborted(f"{DIRECTORY} has no room for {size_text(num_bytes)}: {error.strerror}") from None
    return memory, fd


def _create_locked(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        # somebody took it for a dead one's before it was locked
        os.close(fd)


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
