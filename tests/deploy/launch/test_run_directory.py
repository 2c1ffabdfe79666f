"""The directory of a server: whose it is, how long its path may be, and what becomes of those left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic_moe.cluster.errors import UserError
from elastic_moe.deploy.launch.local_ray import check_shared_memory, check_threads
from elastic_moe.deploy.launch.run_directory import LONGEST_BYTES, RunDirectory, remove_stale


@pytest.fixture
def parent() -> Iterator[Path]:
    """A short one, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as made:
        yield Path(made)


def abandon(directory: RunDirectory) -> None:
    """As the kernel does for a process that was killed."""
    os.close(directory.lock)


def test_the_directory_is_private_under_any_umask(parent: Path) -> None:
    before = os.umask(0)
    try:
        made = RunDirectory.create([str(parent)])
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    abandon(made)


def test_the_longest_path_holds_rays_longest_socket() -> None:
    session = "session_2026-11-26_00-31-32_123456_4194304"
    path = f"{'x' * LONGEST_BYTES}/ray/{session}/sockets/plasma_store"
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(FileNotFoundError):
        # too long would be an OSError of its own: "AF_UNIX path too long"
        probe.bind(path)


def test_a_long_tmpdir_is_passed_over(tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("0" * 100)
    long.mkdir()
    made = RunDirectory.create([str(long), str(parent)])
    assert made.path.parent == parent
    made.remove()
    assert not made.path.exists()
    monkeypatch.setenv("TMPDIR", str(long))
    made = RunDirectory.create()
    assert len(os.fsencode(made.path)) <= LONGEST_BYTES
    made.remove()


@pytest.mark.parametrize("name", ["a b", "a'b", "a#b", "a\\b"])
def test_a_directory_whose_name_haproxy_cannot_read_is_passed_over(parent: Path, name: str) -> None:
    odd = parent / name
    odd.mkdir()
    made = RunDirectory.create([str(odd), str(parent)])
    assert made.path.parent == parent
    made.remove()
    abandon(made)


def test_a_parent_that_is_not_there_is_passed_over(parent: Path) -> None:
    made = RunDirectory.create(["/no/such", str(parent)])
    assert made.path.parent == parent
    made.remove()


def test_a_full_disk_is_passed_over(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(parent)._replace(free=1 << 20)
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full if path == "/tmp" else usage(path))
    made = RunDirectory.create(["/tmp", str(parent)])
    assert made.path.parent == parent
    made.remove()
    abandon(made)


def test_a_file_system_that_locks_no_directories_is_passed_over(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, nfs, there = fcntl.flock, parent / "nfs", parent / "there"
    nfs.mkdir()
    there.mkdir()

    def refuse(descriptor: int, how: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{nfs}/"):
            raise OSError(errno.EBADF, "refused")
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", refuse)
    opened = len(os.listdir("/proc/self/fd"))
    made = RunDirectory.create([str(nfs), str(there)])
    assert made.path.parent == there
    assert not [*nfs.iterdir()]
    abandon(made)
    assert len(os.listdir("/proc/self/fd")) == opened


def test_full_shared_memory_is_reported_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_shared_memory("/no/such")
    check_shared_memory(str(tmp_path))
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match="16 MiB of shared memory, and 1 MiB are free"):
        check_shared_memory(str(tmp_path))


def test_a_low_limit_of_processes_is_reported_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three starts were tried, in half a minute, and the error was that Ray's GCS had ended."""
    limits = [(100, 500)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    # and what this user runs
    with pytest.raises(
        UserError, match=r"ulimit -u: the hard limit of 500 .* of 2 workers needs 500; expected at least"
    ):
        check_threads(2)
    assert limits[-1] == (500, 500)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check_threads(2)
    limits.append((100, resource.RLIM_INFINITY))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    check_threads(2)


def test_without_any_parent_the_error_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"^TMPDIR: .*/no/such"):
        RunDirectory.create(["/no/such"])


def test_what_a_dead_server_left_is_removed_and_a_living_ones_is_not(parent: Path) -> None:
    dead, living = RunDirectory.create([str(parent)]), RunDirectory.create([str(parent)])
    (dead.path / "ray" / "session").mkdir(parents=True)
    abandon(dead)
    other = parent / "emoe-other"
    other.mkdir()
    link = parent / "emoe.link"
    link.symlink_to(other)
    made = RunDirectory.create([str(parent)])
    assert not dead.path.exists()
    assert living.path.exists()
    assert other.exists(), "no name of ours"
    assert link.is_symlink()
    for directory in (living, made):
        abandon(directory)


KILLED = """
import fcntl, os, shutil, signal, sys
from elastic_moe.deploy.launch.run_directory import RunDirectory

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "made":
    fcntl.flock = kill
made = RunDirectory.create([sys.argv[1]])
(made.path / "ray").mkdir()
rmdir = os.rmdir
# when only the directory itself is left
os.rmdir = lambda path, **how: kill() if "emoe" in str(path) else rmdir(path, **how)
made.remove()
"""


@pytest.mark.parametrize("when", ["made", "removed"])
def test_what_a_server_left_that_was_killed_in_between_is_removed(parent: Path, when: str) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(parent), when], check=False)
    assert ended.returncode == -signal.SIGKILL
    [left] = parent.iterdir()
    made = RunDirectory.create([str(parent)])
    assert [*parent.iterdir()] == [made.path], left
    abandon(made)


def test_servers_that_start_at_once_leave_one_anothers_directories(parent: Path) -> None:
    """One may look between the moment at which a directory is made and that at which it is locked."""
    with ThreadPoolExecutor(8) as threads:
        made = [*threads.map(lambda _: RunDirectory.create([str(parent)]), range(200))]
    assert {*parent.iterdir()} == {directory.path for directory in made}
    for directory in made:
        abandon(directory)


def test_a_fork_holds_the_lock_too(parent: Path) -> None:
    made = RunDirectory.create([str(parent)])
    inherited = os.dup(made.lock)
    os.close(made.lock)
    remove_stale(str(parent))
    assert made.path.exists()
    os.close(inherited)
    remove_stale(str(parent))
    assert not made.path.exists()
