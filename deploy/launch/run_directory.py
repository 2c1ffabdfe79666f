"""The private directory of one server, which has a short path and is removed with the server.

Everything that a local server writes lies in it: Ray's session with its sockets and logs, HAProxy's files, and
temporary files of its processes. Only its owner may enter it (mode 0700), so that nobody else can replace a socket. The
server holds a lock on the directory itself while it runs. One that nobody has locked was left behind, by a server that
was killed at whatever moment, and the next server removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_moe.cluster.errors import UserError

PREFIX = "emoe."
LONGEST_BYTES = 36
"""Most bytes of the path. A socket's path has at most 107 bytes, of which Ray needs the rest: it appends
`/session_DATE_TIME_PID/sockets/plasma_store` to `ray`."""
LEAST_FREE_BYTES = 64 << 20
"""Free space that the logs of Ray and Serve need at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDirectory:
    path: Path
    lock: int
    """File descriptor of the directory, which holds the lock. Forked processes hold the lock too."""

    @classmethod
    def create(cls, parents: Sequence[str] | None = None) -> RunDirectory:
        """Make a directory in the first of `parents` that is short and plain enough, can be written and has space.

        Directories that dead servers have left there are removed.

        Raises UserError where no parent will do.
        """
        tried = parents if parents is not None else _parents()
        for parent in tried:
            # mkdtemp appends eight characters
            if len(os.fsencode(parent)) + 1 + len(PREFIX) + 8 > LONGEST_BYTES:
                continue
            # HAProxy's configuration has paths as they are
            if any(letter.isspace() or letter in "\"'\\#$" for letter in parent):
                continue
            with contextlib.suppress(OSError):
                remove_stale(parent)
                if shutil.disk_usage(parent).free < LEAST_FREE_BYTES:
                    continue
                path, lock = _make_locked(parent)
                try:
                    made = cls(path=path, lock=lock)
                    made.temporary.mkdir(mode=0o700)
                    return made
                except OSError:
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(lock)
        raise UserError(
            "TMPDIR: a server needs a directory for its sockets and logs that it can write, that has"
            f" {LEAST_FREE_BYTES >> 20} MiB free, and whose path has at most {LONGEST_BYTES - len(PREFIX) - 9} bytes"
            f" and no blanks or quotes; none of {', '.join(tried)} is one"
        )

    @property
    def ray(self) -> Path:
        """The directory for Ray's sessions. Ray opens it to everybody; the directory around it stays closed."""
        return self.path / "ray"

    @property
    def temporary(self) -> Path:
        return self.path / "tmp"

    def remove(self) -> None:
        """Remove the directory with its contents. Call this when no process of the server is left. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)


def remove_stale(parent: str) -> None:
    """Remove the directories in `parent` that belong to this user and whose server has ended."""
    for path in Path(parent).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _parents() -> list[str]:
    named = [os.path.abspath(os.environ["TMPDIR"])] if os.environ.get("TMPDIR") else []
    return [*named, "/tmp", "/var/tmp", "/dev/shm"]


def _make_locked(parent: str) -> tuple[Path, int]:
    """A new directory, and the descriptor that locks it. Raises OSError where none can be made, or be locked."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        # another server may take it for a dead one's before it is locked
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                # such as NFS, where a directory cannot be locked
                os.close(lock)
                path.rmdir()
                raise
            if path.exists():
                return path, lock
            os.close(lock)
