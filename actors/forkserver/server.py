"""The fork servers: each imports what its workers need, and forks for each launcher that connects.

A server has one thread, opens no device and starts nothing, so a fork of it is as good as a new process. Ray's library
starts its threads when it connects, not when it is imported. A server ends with its raylet, or when it has had no fork
for IDLE_S seconds. If it is killed, its forks go on, and the next launcher starts another one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import time

from elastic_moe.actors.forkserver.imports import import_model
from elastic_moe.actors.forkserver.ray_draws import draws_are_common, none_for_classes
from elastic_moe.actors.forkserver.request import NAME, Stage, name_process, peer_of, surroundings
from elastic_moe.cluster.interpreter import no_collection
from elastic_moe.cluster.lines import counted

IDLE_S = 60.0
POLL_S = 5.0


def main() -> None:
    """The process itself: sys.argv has the servers to be, in the order of their stages: each with the descriptor of a
    socket that listens, the path of that socket, and the stage."""
    openings = [
        (socket.socket(fileno=descriptor), path, Stage(*stage)) for descriptor, path, stage in json.loads(sys.argv[1])
    ]
    if os.fork():
        os._exit(0)
    for listener, _, _ in openings:
        os.set_inheritable(listener.fileno(), False)
    # a worker's process group ends with the worker
    os.setpgid(0, 0)
    os.chdir("/")
    name_process(NAME)
    ours, environment = surroundings(), dict(os.environ)
    # A worker's process has these when it imports numpy and PyTorch: Ray gives it one thread unless the user says
    # otherwise, and the worker sets the number itself. With more, numpy's library starts threads
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    while openings:
        listener, path, stage = openings.pop(0)
        if reason := _import(stage):
            sys.stderr.write(f"workers are not forked: {reason}\n")
            return
        # a fork does not map the pages of libraries which only the imports have run: 46 MB
        if os.fork() == 0:
            break
        listener.close()
    else:
        os._exit(0)
    os.setpgid(0, 0)
    for other, _, _ in openings:
        other.close()
    connection = Server(listener, path, int(environment["RAY_RAYLET_PID"])).run()
    if connection is None:
        return
    from elastic_moe.actors.forkserver.fork import become_worker

    # the call is outermost, as a script's own code is
    become_worker(connection, ours, environment)


def _import(stage: Stage) -> str:
    """Import what workers of this stage need. Returns why this process must not be forked, or nothing."""
    with no_collection(), none_for_classes():
        for module in (*stage.modules, "elastic_moe.actors.forkserver.fork"):
            importlib.import_module(module)
    if stage.model:
        import_model()
        import torch

        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return "the imports have opened a GPU"
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        return f"the imports have started {counted(threads - 1, 'thread')}"
    return "the imports have drawn from Ray's random numbers" if draws_are_common() else ""


class Server:
    """Accepts connections, forks, and reaps. A fork does everything else, so no launcher can hold the server up."""

    def __init__(self, listener: socket.socket, path: str, raylet: int, idle_s: float = IDLE_S) -> None:
        """raylet: the process with which this server ends. Raises OSError where it has ended."""
        self._listener = listener
        self._path = path
        self._idle_s = idle_s
        self._raylet = os.pidfd_open(raylet)
        self._wakes, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._forks: set[int] = set()

    def run(self) -> socket.socket | None:
        """In each fork, the connection to its launcher; in the server, None when it is to end."""
        # from now on launchers see this process at the other end, and know that it need not import any more
        self._listener.listen(socket.SOMAXCONN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake)
        poll = select.poll()
        for descriptor in (self._raylet, self._wakes, self._listener.fileno()):
            poll.register(descriptor, select.POLLIN)
        busy_at = time.monotonic()
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(1000 * POLL_S)}
            self._reap()
            if self._listener.fileno() in ready and (connection := self._fork()) is not None:
                return connection
            if self._forks:
                busy_at = time.monotonic()
            if self._raylet in ready or time.monotonic() - busy_at > self._idle_s:
                break
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        return None

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakes, 512)
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self._forks.discard(pid)

    def _fork(self) -> socket.socket | None:
        """Accept a connection, and fork for it. Returns the connection in the fork, and None in the server."""
        try:
            connection, _ = self._listener.accept()
            if peer_of(connection)[1] != os.geteuid():
                connection.close()
                return None
            fork = os.fork()
        except OSError:
            # the launcher has gone, or there is no memory: it sees the end of its connection
            return None
        if fork:
            self._forks.add(fork)
            connection.close()
            return None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (self._raylet, self._wakes, self._wake):
            os.close(descriptor)
        self._listener.close()
        return connection
