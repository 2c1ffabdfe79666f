"""A process that does nothing is found, and one that works, however slowly, is not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from elastic_moe.actors import stillness
from elastic_moe.actors.stillness import StandsStill, Watch, ended_if_still, while_it_works

Start = Callable[..., "subprocess.Popen[bytes]"]

LOOPS = "while True: pass"
SLEEPS = "import time; time.sleep(600)"
WORKS_IN_A_THREAD = f"import threading; threading.Thread(target=lambda: exec({LOOPS!r})).start()"
WAITS_FOR_A_CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stillness, "HELPER_LOOK_S", 0.05)
    monkeypatch.setattr(stillness, "STOPPED_S", 0.5)
    monkeypatch.setattr(stillness, "BLOCKED_S", 1.0)


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def begin(code: str, **how: object) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, **how)  # type: ignore[call-overload]
        started.append(process)
        return process

    yield begin
    for process in started:
        for child in psutil.Process(process.pid).children() if process.poll() is None else []:
            child.kill()
        process.kill()
        process.communicate()


def looks(watch: Watch, seconds: float) -> str:
    """Why the process is given up within the time; empty if it is not."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            watch.look()
        except (StandsStill, TimeoutError) as why:
            return str(why)
        time.sleep(stillness.HELPER_LOOK_S)
    return ""


def test_one_that_is_stopped_is_found_and_one_that_is_stopped_for_a_moment_is_not(start: Start) -> None:
    process = start(LOOPS)
    watch = Watch(process.pid)
    for _ in range(3):
        os.kill(process.pid, signal.SIGSTOP)
        assert not looks(watch, 0.2)
        os.kill(process.pid, signal.SIGCONT)
        assert not looks(watch, 0.1)
    os.kill(process.pid, signal.SIGSTOP)
    assert "has been stopped" in looks(watch, 30)
    watch.kill()
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("code", [SLEEPS, WAITS_FOR_A_CHILD])
def test_one_that_waits_for_good_is_found_unless_it_may(start: Start, code: str) -> None:
    process = start(code)
    assert "has done nothing" in looks(Watch(process.pid), 30)
    assert not looks(Watch(process.pid, may_wait=True), 1.5)


@pytest.mark.slow
@pytest.mark.parametrize("code", [LOOPS, WORKS_IN_A_THREAD])
def test_one_that_gets_little_of_the_processor_is_not(start: Start, code: str) -> None:
    core = {min(os.sched_getaffinity(0))}
    # all on one core, of which it gets a hundredth
    others = [start(LOOPS) for _ in range(2)]
    process = start(code, preexec_fn=lambda: os.nice(19))
    for each in (process, *others):
        os.sched_setaffinity(each.pid, core)
    assert not looks(Watch(process.pid), 3.0)


def test_processor_time_has_a_limit(start: Start) -> None:
    process = start(LOOPS)
    assert "more than 0 s of processor time" in looks(Watch(process.pid, processor_s=0.2), 30)


def test_nobody_else_is_killed_where_a_number_is_used_again(start: Start) -> None:
    first = start(LOOPS)
    # their times of birth, in hundredths of a second, differ
    time.sleep(0.1)
    other = start(LOOPS)
    watch = Watch(first.pid)
    watch.pid = other.pid
    watch.kill()
    first.kill()
    first.wait()
    assert other.poll() is None


def test_who_waits_is_told(start: Start) -> None:
    process = start(LOOPS)
    assert process.stdout is not None
    os.kill(process.pid, signal.SIGSTOP)

    async def wait() -> None:
        waiting = asyncio.get_running_loop().create_future()
        with pytest.raises(StandsStill):
            await while_it_works(waiting, Watch(process.pid))
        assert waiting.cancelled()

    asyncio.run(wait())
    with ended_if_still(process) as ended:
        assert process.stdout.read() == b"", "its pipe ends"
    assert isinstance(ended.why, StandsStill)


def test_time_does_not_pass_while_whoever_waits_is_stopped_too(start: Start) -> None:
    process = start(LOOPS)
    watch = Watch(process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    watch.look()
    time.sleep(1.0)
    watch.look()
    os.kill(process.pid, signal.SIGCONT)
    assert not looks(watch, 0.3)
