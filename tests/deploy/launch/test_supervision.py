"""What the supervisor decides, without any process; then the supervisor itself over main processes without Ray."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from elastic_moe.deploy.launch.supervision import (
    ANSWER_S,
    ATTEMPTS,
    NOTHING,
    TRY_AGAIN,
    AskToStop,
    End,
    Phase,
    StartAgain,
    Supervision,
    Wait,
)
from tests.paths import ROOT


def rules(*, local: bool = True) -> Supervision:
    return Supervision(local=local, stop_s=30)


def test_a_signal_during_the_start_ends_it_at_once() -> None:
    assert rules().signalled(signal.SIGINT, 5) == End(code=0, say="stopping")


def test_on_a_joined_cluster_even_a_start_is_taken_down_in_good_order() -> None:
    assert rules(local=False).signalled(signal.SIGINT, 5) == AskToStop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number: int) -> None:
    server = rules()
    server.reached(Phase.SERVING, 0)
    assert server.signalled(number, 5) == AskToStop()
    assert server.signalled(number, 6) == End(code=128 + number)


def test_an_orderly_end_takes_no_longer_than_it_may() -> None:
    server = rules()
    server.reached(Phase.SERVING, 0)
    server.signalled(signal.SIGTERM, 100)
    server.reached(Phase.STOPPING, 101)
    assert server.tick(130, load=1) == NOTHING
    end = server.tick(132, load=1)
    assert isinstance(end, End)
    assert end.code == 1
    assert "killed" in end.say


def test_a_main_process_that_does_not_begin_to_stop_hangs() -> None:
    server = rules()
    server.reached(Phase.SERVING, 0)
    server.signalled(signal.SIGTERM, 100)
    assert isinstance(server.tick(101 + ANSWER_S, load=1), End)


def test_the_main_process_reports_its_exit_code() -> None:
    server = rules()
    server.reached(Phase.STOPPING, 0)
    assert server.main_ended(2) == End(code=2)


def test_a_start_that_failed_is_tried_again_and_not_for_ever() -> None:
    server = rules()
    for attempt in range(2, ATTEMPTS + 1):
        server.failure = "GCS did not answer"
        # it reports its own end
        server.reached(Phase.STOPPING, 0)
        again = server.main_ended(TRY_AGAIN)
        assert isinstance(again, StartAgain)
        assert f"GCS did not answer; starting again ({attempt} of {ATTEMPTS})" in again.say
        assert server.phase is Phase.STARTING
    server.failure = "GCS did not answer"
    end = server.main_ended(TRY_AGAIN)
    assert isinstance(end, End)
    assert end.code == 1
    assert "GCS did not answer" in end.say


def test_no_second_start_after_a_signal() -> None:
    server = rules(local=False)
    server.signalled(signal.SIGINT, 0)
    assert server.main_ended(TRY_AGAIN) == End(code=1)


def test_no_second_start_on_a_cluster_that_was_joined() -> None:
    server = rules(local=False)
    server.failure = "it refused"
    assert server.main_ended(TRY_AGAIN) == End(code=1, say="emoe: error: it refused")


def test_a_crash_during_the_start_is_tried_again_and_a_kill_is_not() -> None:
    assert isinstance(rules().main_ended(-signal.SIGABRT), StartAgain)
    end = rules().main_ended(-signal.SIGKILL)
    assert isinstance(end, End)
    assert "SIGKILL" in end.say


def test_the_death_of_a_part_of_ray_ends_a_server_and_says_which() -> None:
    server = rules()
    server.reached(Phase.SERVING, 0)
    end = server.part_died("Ray's raylet", 77)
    assert isinstance(end, End)
    assert end.code == 1
    assert "Ray's raylet (process 77)" in end.say


def test_parts_may_die_while_the_server_stops() -> None:
    server = rules()
    server.reached(Phase.SERVING, 0)
    server.reached(Phase.STOPPING, 0)
    assert server.part_died("Ray's raylet", 77) == NOTHING


def test_a_part_that_dies_during_the_start_is_started_again() -> None:
    assert isinstance(rules().part_died("Ray's GCS", 77), StartAgain)


def test_a_long_start_says_what_it_waits_for_and_why() -> None:
    server = rules()
    assert server.tick(99, load=12) == NOTHING
    server.stage("starting Ray", 100)
    assert server.tick(110, load=12) == NOTHING
    said = server.tick(125, load=12)
    assert said == Wait(say="still starting Ray, for 25 s; the machine is busy: 12 processes per core")
    assert server.tick(130, load=12) == NOTHING
    assert server.tick(146, load=1) == Wait(say="still starting Ray, for 46 s")


def test_a_server_whose_command_is_gone_ends() -> None:
    assert rules().abandoned(0) == End(code=1)
    joined = rules(local=False)
    assert joined.abandoned(0) == AskToStop()
    assert joined.abandoned(1) == NOTHING


PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from elastic_moe.deploy.launch.supervision import Phase
from elastic_moe.deploy.launch.supervisor import supervised

there = Path(sys.argv[1])

def main(report):
    # their parent ends, and they have sessions of their own, as Ray's workers have
    subprocess.run(["sh", "-c", "setsid sleep 60 & setsid sleep 60 &"])
    {body}
    return 0

sys.exit(supervised(main, local=True, stop_s=20, clean_up=lambda: there.unlink(missing_ok=True)))
"""
STOPPABLE = "signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); report.phase(Phase.SERVING)"
STUBBORN = "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True)); report.phase(Phase.SERVING)"


class Run:
    """A command with a supervisor and a main process. The file at `there` exists until the supervisor cleans up."""

    def __init__(self, directory: Path, body: str) -> None:
        self.there = directory / "there"
        self.there.touch()
        body = textwrap.indent(textwrap.dedent(body), "    ").strip()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.replace("{body}", body), str(self.there)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def wait_for_main(self) -> list[psutil.Process]:
        """Everything below the command, once the main process has said `ready`."""
        assert self.read() == "ready\n"
        family = psutil.Process(self.process.pid).children(recursive=True)
        # supervisor, main process, and two that have lost their parents
        assert len(family) >= 4
        return family

    def end(self) -> tuple[int, str]:
        out, error = self.process.communicate(timeout=30)
        return self.process.returncode, out + error


Start = Callable[[str], Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def run(body: str) -> Run:
        runs.append(Run(tmp_path, body))
        return runs[-1]

    yield run
    for made in runs:
        # its supervisor ends the others
        made.process.kill()
        made.process.communicate()


def gone(family: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(family, timeout=10)[1]


READY = 'print("ready", flush=True); time.sleep(60)'


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("before", ["", STOPPABLE], ids=["start", "serving"])
def test_a_signal_leaves_nothing(start: Start, before: str, number: int) -> None:
    run = start(f"{before}; {READY}".lstrip("; "))
    family = run.wait_for_main()
    run.process.send_signal(number)
    assert run.end()[0] == 0
    assert gone(family)
    assert not run.there.exists()


def test_the_second_signal_ends_what_does_not_end(start: Start) -> None:
    run = start(f"{STUBBORN}; {READY}")
    family = run.wait_for_main()
    run.process.send_signal(signal.SIGINT)
    assert run.read() == "asked\n"
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == 130
    assert gone(family)
    assert not run.there.exists()


@pytest.mark.parametrize("victim", ["command", "supervisor", "main"])
def test_a_kill_leaves_nothing(start: Start, victim: str) -> None:
    run = start(f"report.phase(Phase.SERVING); {READY}")
    family = run.wait_for_main()
    supervisor = psutil.Process(run.process.pid).children()[0]
    main = supervisor.children()[0]
    for process in family:
        # a process that is stopped cannot end by itself
        if process.name() == "sleep":
            process.suspend()
    {"command": psutil.Process(run.process.pid), "supervisor": supervisor, "main": main}[victim].kill()
    code, text = run.end()
    assert gone(family)
    assert not run.there.exists()
    if victim != "command":
        assert code == 1
        assert text.startswith("emoe: error: the server's ")
        assert len(text.splitlines()) == 1


def test_a_part_that_died_ends_the_server_with_a_line(start: Start) -> None:
    run = start(
        f"""
        part = subprocess.Popen(["sleep", "60"])
        report.part("Ray's raylet", part.pid)
        report.phase(Phase.SERVING)
        {READY.replace(";", "; part.kill();", 1)}
        """
    )
    code, text = run.end()
    assert code == 1
    assert "Ray's raylet" in text
    assert not run.there.exists()


def test_a_failed_start_is_cleared_away_and_tried_again(start: Start, tmp_path: Path) -> None:
    run = start(
        f"""
        marker = Path({str(tmp_path / "tried")!r})
        if not marker.exists():
            marker.touch()
            report.failure("too busy")
            return {TRY_AGAIN}
        print("ready", flush=True)
        report.phase(Phase.STOPPING)
        return 0
        """
    )
    code, text = run.end()
    assert code == 0, text
    assert "too busy; starting again (2 of 3)" in text
    assert "ready" in text
    assert not run.there.exists()
