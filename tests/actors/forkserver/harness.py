"""A fork server that imports no model, below a process that stands for the raylet, and launchers as Ray starts them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from elastic_moe.actors.forkserver import launcher
from elastic_moe.actors.forkserver.request import NAME, Stage, name_process, surroundings
from elastic_moe.actors.forkserver.server import Server
from elastic_moe.actors.forkserver.stages import MODEL
from elastic_moe.cluster.interpreter import command_of

SCRIPT = str(Path(__file__).with_name("report.py"))


def bare_server() -> None:
    """A process's main function: `server.main` without imports. sys.argv: socket's path, seconds without forks."""
    from elastic_moe.actors.forkserver.fork import become_worker

    path, idle_s = sys.argv[1:]
    os.setpgid(0, 0)
    name_process(NAME)
    ours, environment = surroundings(), dict(os.environ)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{path}.new")
    listener.listen(8)
    os.rename(f"{path}.new", path)
    connection = Server(listener, path, int(environment["RAY_RAYLET_PID"]), float(idle_s)).run()
    if connection is not None:
        become_worker(connection, ours, environment)


class Node:
    """What a raylet is for its workers: a process, its environment, and the directory of its sockets."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.raylet = subprocess.Popen(["sleep", "1000"])
        # pytest sets it anew in each phase of a test
        os.environ.pop("PYTEST_CURRENT_TEST", None)
        self.environment = os.environ | {"RAY_RAYLET_PID": str(self.raylet.pid), "OPENBLAS_NUM_THREADS": "1"}
        self.lock = directory / f"fork_{self.raylet.pid}.lock"
        self.path = self.path_of(MODEL)
        self.started: list[subprocess.Popen[str]] = []

    def path_of(self, stage: Stage) -> Path:
        """The socket of the stage's server. `path` is that of the workers which compute."""
        return self.directory / f"fork_{self.raylet.pid}_{stage.name}"

    def arguments(self, report: Path, *rest: str) -> list[str]:
        """The script that stands for Ray's, and its arguments."""
        return [SCRIPT, str(report), f"--raylet-name={self.directory}/raylet", *rest]

    def serve(self, idle_s: float = 60) -> subprocess.Popen[str]:
        """Start a server that imports nothing, and wait until it listens."""
        # of one that was killed
        self.path.unlink(missing_ok=True)
        process = self.start(command_of(bare_server, str(self.path), str(idle_s)))
        wait(self.path.exists)
        return process

    def launch(
        self, report: Path, *rest: str, stages: Sequence[Stage] = (MODEL,), **environment: str
    ) -> subprocess.Popen[str]:
        """Start a worker as Ray does."""
        arguments = self.arguments(report, *rest)
        return self.start(["bash", "-c", f"exec {launcher.command(stages)} {' '.join(arguments)}"], **environment)

    def plain(self, report: Path, *rest: str) -> subprocess.Popen[str]:
        """The same without a launcher."""
        return self.start(["bash", "-c", f"exec {sys.executable} {' '.join(self.arguments(report, *rest))}"])

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            env=self.environment | environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # as the raylet does
            process_group=0,
        )
        self.started.append(process)
        return process

    def hand_over(self, report: Path, *rest: str, within_s: float = 10) -> int:
        """In this process, which is no worker."""
        os.environ.pop("PYTEST_CURRENT_TEST", None)
        return launcher.hand_over(sys.path, self.arguments(report, *rest), [MODEL], time.monotonic() + within_s)

    def close(self) -> None:
        family = [psutil.Process(process.pid) for process in self.started if psutil.pid_exists(process.pid)]
        for process in [*family, *(child for parent in family for child in parent.children(recursive=True))]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.raylet.kill()
        for running in [*self.started, self.raylet]:
            running.wait()
            if running.stdout is not None:
                running.stdout.close()


@contextlib.contextmanager
def node(directory: Path) -> Iterator[Node]:
    made = Node(directory)
    try:
        yield made
    finally:
        made.close()


def read(report: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the script has found: what a fork must have in common with a new process, and what is its own."""
    wait(report.exists)
    common, own = json.loads(report.read_text())
    return common, own


def wait(true: Callable[[], object], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True
