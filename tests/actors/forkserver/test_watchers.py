"""A watcher takes the place of a process that ends early, and of none whose work goes on."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from elastic_moe.actors.forkserver import launcher, setup_worker
from elastic_moe.actors.forkserver.request import NAME
from elastic_moe.actors.forkserver.stages import MODEL
from tests.actors.forkserver.harness import Node, node, wait


@pytest.fixture
def a_node(tmp_path: Path) -> Iterator[Node]:
    with node(tmp_path) as made:
        made.environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        yield made


def begins(a_node: Node, command: str) -> list[str]:
    """What has begun, and what the command has added, when all has ended."""
    log = a_node.directory / "log"
    module = f"{__package__}.watched"
    process = a_node.start([sys.executable, "-m", module, str(log), command])
    process.wait(30)
    # twice: what begins while processes are listed is not in the list
    wait(lambda: not begun(a_node) and not begun(a_node))
    return log.read_text().splitlines()


def begun(a_node: Node) -> list[psutil.Process]:
    """Processes of this node other than fork servers."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            raylet = process.environ().get("RAY_RAYLET_PID")
            if raylet == str(a_node.raylet.pid) and process.name() != NAME:
                found.append(process)
    return found


def test_what_ends_again_and_again_begins_a_few_times(a_node: Node) -> None:
    assert begins(a_node, "kill -KILL $$") == ["began"] * (1 + setup_worker.TRIES)


def test_a_process_that_ends_while_another_goes_on_for_it_is_not_begun_again(a_node: Node) -> None:
    """The other one is not known to the watcher, and has what reaches it."""
    goes_on = "(sleep 0.5; echo other >> log; printf . >&$EMOE_WATCHER) & kill -KILL $$"
    assert begins(a_node, goes_on) == ["began", "other"]


def test_a_process_is_begun_again_when_what_went_on_for_it_ends_early_too(a_node: Node) -> None:
    both_end = "[ $(wc -l < log) -gt 2 ] && exit; (sleep 0.5; echo other >> log) & kill -KILL $$"
    assert begins(a_node, both_end) == ["began", "other"] + ["began"] * setup_worker.TRIES


@pytest.mark.parametrize("ends", ["it", "its launcher", "both"])
def test_a_fork_is_watched_from_its_beginning(a_node: Node, ends: str) -> None:
    """Its launcher has ended when the fork begins Ray's script, which has a watcher of its own stand by."""
    a_node.serve()
    script = a_node.directory / "script.py"
    ended = {"it": "[os.getpid()]", "its launcher": "[os.getpgid(0)]", "both": "[os.getpgid(0), os.getpid()]"}[ends]
    script.write_text(f"""\
import contextlib, os, signal
from elastic_moe.actors.forkserver.setup_worker import dismiss
with open("log") as file:
    times = len(file.readlines())
with open("log", "a") as file:
    file.write(f"{{os.environ['EMOE_PROCESS_ORIGIN'].split()[0]}}\\n")
if times == 1:
    for pid in {ended}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
dismiss(os.environ)
""")
    arguments = shlex.join([str(script), f"--raylet-name={a_node.directory}/raylet"])
    seen = begins(a_node, f"exec {launcher.command([MODEL])} {arguments}")
    assert seen == ["began", "forked"] * (1 if ends == "its launcher" else 2)
