"""The names of segments: none is left behind by a rank that is killed, and none of a living rank is removed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec
from elastic_moe.cluster.placement import Worker, WorkerId, contiguous
from elastic_moe.model.exchange.join import join_exchange
from elastic_moe.model.native.segments import DIRECTORY, join, remove_stale

RANK = """
import os, sys, time
from elastic_moe.model.native import segments

group, rank, when = sys.argv[1:]
if when == "made":
    os.posix_fallocate = lambda *_: time.sleep(600)
segments.join(group, int(rank), 2, 4096, 600.0, lambda _: time.sleep(600 if when == "met" else 0))
"""


@pytest.fixture
def group() -> Iterator[str]:
    name = f"emoe-test-{uuid.uuid4().hex[:8]}"
    yield name
    for path in DIRECTORY.glob(f"{name}*"):
        path.unlink()


def start(group: str, rank: int, when: str = "") -> subprocess.Popen[bytes]:
    """A process that joins as this rank. when: the moment at which it stays: "made", "met"; else it waits for its
    peer."""
    process = subprocess.Popen([sys.executable, "-c", RANK, group, str(rank), when])
    while process.poll() is None and not names(group, rank):
        time.sleep(0.01)
    return process


def names(group: str, rank: int) -> list[Path]:
    return [*DIRECTORY.glob(f"{group}-{rank}*")]


def join_another_group() -> None:
    """A group of one, as after the loss of the other worker: it has no segments."""
    placement = contiguous(1, 2, (Worker(id=WorkerId("w0"), node="n", slots=2),))
    spec = EpochSpec(epoch=Epoch(2), placement=placement, group="emoe-next", transport="local", rendezvous="")
    join_exchange(spec, 0, [], native=False, max_tokens=1, timeout_s=1.0)


@pytest.mark.parametrize("when", ["made", "waits", "met"])
def test_what_a_killed_rank_leaves_goes_with_the_next_group(group: str, when: str) -> None:
    processes = [start(group, rank, when) for rank in ((0, 1) if when == "met" else (0,))]
    if when == "met":
        time.sleep(0.5)
    for process in processes:
        process.kill()
        process.wait()
    assert names(group, 0)
    join_another_group()
    assert not [*DIRECTORY.glob(f"{group}*")]


def test_a_rank_that_lives_keeps_its_name(group: str) -> None:
    """Whatever process looks: it may be one of another server, or in another namespace of processes."""
    waits = start(group, 0)
    os.kill(waits.pid, signal.SIGSTOP)
    join_another_group()
    assert names(group, 0)
    os.kill(waits.pid, signal.SIGCONT)
    join(group, 1, 2, 4096, 60.0, lambda _: time.sleep(0.5))
    assert waits.wait(60) == 0
    assert not [*DIRECTORY.glob(f"{group}*")]


def test_ranks_join_while_others_look_for_names(group: str) -> None:
    """One may look between the moment at which a file is made and that at which it is locked."""
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            remove_stale()

    def meet_twice(number: int) -> None:
        met = threading.Barrier(2)
        with ThreadPoolExecutor(2) as ranks:
            for rank in ranks.map(
                lambda r: join(f"{group}-{number}", r, 2, 4096, 60.0, lambda _: met.wait(60)), (0, 1)
            ):
                assert rank is None

    looking = [threading.Thread(target=look) for _ in range(2)]
    for thread in looking:
        thread.start()
    try:
        for number in range(100):
            meet_twice(number)
    finally:
        over.set()
        for thread in looking:
            thread.join()
    assert not [*DIRECTORY.glob(f"{group}*")]


def test_what_has_no_room_is_told_in_its_unit(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    for num_bytes, text in ((4096, "4.1 kB"), (5 << 30, "5.4 GB")):
        with pytest.raises(StepAborted, match=f"^/dev/shm has no room for {text}: No space left on device$"):
            join(group, 0, 2, num_bytes, 1.0, lambda _: None)
    assert not names(group, 0)


def test_a_file_of_another_program_stays() -> None:
    path = DIRECTORY / f"{uuid.uuid4().hex}.segment"
    path.touch()
    try:
        remove_stale()
        assert path.exists()
    finally:
        path.unlink()
