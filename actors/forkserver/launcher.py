"""The command that Ray runs in place of Python: hands the worker that it is to be over to a fork of a server.

There is one server of each stage for each raylet. Its socket lies beside the raylet's own, in the directory of Ray's
session, and the first launcher that finds nobody there starts a server. All launchers that come while it imports wait
for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator, Sequence

from elastic_moe.actors.forkserver.origin import note_start
from elastic_moe.actors.forkserver.request import (
    GO,
    Answer,
    Request,
    Stage,
    is_server,
    peer_of,
    receive_answer,
    send,
    surroundings,
)
from elastic_moe.actors.forkserver.setup_worker import WatchedApart

WAIT_S = 20.0
"""Seconds in which a fork must have answered, the server's imports included. Then this process starts as usual."""
ANSWER_S = 5.0
"""The same where the server has imported everything. A server that is later hangs, and is killed."""
_RAYLET = "--raylet-name="
_PAUSE_S = 0.02


class Refused(Exception):
    """No fork can stand for this process. The text says why."""


def command(stages: Sequence[Stage]) -> str:
    """A shell's command that takes the place of Python in the command of a Ray worker, for Ray's `py_executable`. It
    finds modules where this process does.

    stages: the first is the worker's own. If its server is to be started, so are those of the others that never were.
    """
    code = (
        f"import sys; before = sys.path[:]; sys.path[:] = {sys.path!r}; "
        f"from {__name__} import main; main(before, sys.argv[1:], {[tuple(stage) for stage in stages]!r})"
    )
    return shlex.join([sys.executable, "-P", "-c", code])


def main(search_path: list[str], arguments: list[str], stages: Sequence[tuple[str, Sequence[str], bool]]) -> None:
    """Become the worker: by a fork, after which this process ends, or in this process. Does not return.

    search_path: where Python looks for modules, before this project changed that. arguments: the script that Ray runs,
    and its own. stages: as in `command`.
    """
    with WatchedApart(os.environ) as watcher:
        try:
            hand_over(search_path, arguments, [Stage(*stage) for stage in stages], time.monotonic() + WAIT_S, watcher)
        except (OSError, ValueError, Refused) as error:
            refusal = str(error) or type(error).__name__
        else:
            refusal = ""
    if refusal:
        note_start(os.environ, refusal)
        os.execv(sys.executable, [sys.executable, *arguments])
    # The watcher of this process is the fork's now. Not by sys.exit: nothing of this process is to be undone
    os._exit(0)


def hand_over(
    search_path: list[str],
    arguments: list[str],
    stages: Sequence[Stage],
    deadline: float,
    watcher: int | None = None,
) -> int:
    """Returns the process id of the fork that runs the script now. deadline: as time.monotonic() tells. watcher: the
    descriptor by which the watcher of this process is told that it may end; it is for the fork to say.

    Raises Refused, or OSError or ValueError where the server does not answer as it should: then no fork runs.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    sockets = {f"{socket_path(arguments, os.environ)}_{stage.name}": stage for stage in stages}
    with _connected(sockets, deadline) as connection, _directory() as directory:
        request = Request(
            arguments=arguments,
            search_path=search_path,
            environment=dict(os.environ),
            surroundings=surroundings(),
            process_group=os.getpgid(0),
            umask=umask,
        )
        send(connection, request, [0, 1, 2, directory, *([] if watcher is None else [watcher])])
        answer = _answer(connection, deadline)
        if answer.refusal:
            raise Refused(answer.refusal)
        connection.sendall(GO)
        return answer.pid


def _answer(connection: socket.socket, deadline: float) -> Answer:
    server, _ = peer_of(connection)
    ready = is_server(server)
    left_s = max(0.0, deadline - time.monotonic())
    connection.settimeout(min(left_s, ANSWER_S) if ready else left_s)
    try:
        return receive_answer(connection)
    except TimeoutError:
        # it lives, as the connection has not ended
        if ready:
            os.kill(server, signal.SIGKILL)
        raise


def socket_path(arguments: list[str], environment: os._Environ[str]) -> str:
    """Where servers of the raylet that has started this process listen, without their stages. Raises Refused where no
    raylet has."""
    raylet = environment.get("RAY_RAYLET_PID", "")
    sockets = [os.path.dirname(value.removeprefix(_RAYLET)) for value in arguments if value.startswith(_RAYLET)]
    if not raylet.isdigit() or not sockets:
        raise Refused("no raylet has started this process")
    return os.path.join(sockets[0], f"fork_{raylet}")


@contextlib.contextmanager
def _directory() -> Iterator[int]:
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield directory
    finally:
        os.close(directory)


@contextlib.contextmanager
def _connected(sockets: dict[str, Stage], deadline: float) -> Iterator[socket.socket]:
    """sockets: the paths of all stages' sockets, the first of which is to be connected."""
    path = next(iter(sockets))
    connection = _connect(path, deadline) or _start(sockets, deadline)
    with connection:
        # the directory may be open to everybody, and whoever gets the request has the keys of its environment
        if peer_of(connection)[1] != os.geteuid():
            raise Refused(f"{path} is another user's")
        yield connection


def _connect(path: str, deadline: float) -> socket.socket | None:
    """None where nobody listens. Raises TimeoutError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(max(0.0, deadline - time.monotonic()))
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError:
        connection.close()
        raise
    return connection


def _start(sockets: dict[str, Stage], deadline: float) -> socket.socket:
    """Start the server, unless another launcher has done so meanwhile. It listens from the beginning, and answers when
    it has imported everything; if it fails, the connection ends."""
    path = next(iter(sockets))
    with contextlib.ExitStack() as opened:
        # of all stages, as one start may be that of several
        opened.enter_context(_lock(f"{path.rpartition('_')[0]}.lock", deadline))
        if (connection := _connect(path, deadline)) is not None:
            return connection
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(path).st_uid != os.geteuid():
                raise Refused(f"{path} is another user's")
            os.unlink(path)
        missing = {name: stage for name, stage in sockets.items() if not os.path.lexists(name)}
        _spawn([(opened.enter_context(_listener(name)), name, stage) for name, stage in missing.items()])
        connection = _connect(path, deadline)
    if connection is None:
        raise Refused("the fork server has failed")
    return connection


def _listener(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        listener.bind(path)
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(umask)
    return listener


def _spawn(openings: Sequence[tuple[socket.socket, str, Stage]]) -> None:
    import subprocess

    from elastic_moe.actors.forkserver.server import main as server
    from elastic_moe.cluster.interpreter import command_of

    descriptors = [listener.fileno() for listener, _, _ in openings]
    told = [(descriptor, path, stage) for descriptor, (_, path, stage) in zip(descriptors, openings, strict=True)]
    # the process that is started here ends at once, and leaves the servers behind as nobody's children: Ray kills the
    # children of a worker with it
    subprocess.run(
        command_of(server, json.dumps(told)),
        pass_fds=descriptors,
        # not what a library in C has added, such as readline: a request tells this one
        env=dict(os.environ),
        stdin=subprocess.DEVNULL,
        check=False,
    )


@contextlib.contextmanager
def _lock(path: str, deadline: float) -> Iterator[None]:
    """Hold the lock file at `path`. Raises TimeoutError, OSError where it cannot be written, and Refused where it is
    another user's."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
            raise Refused(f"{path} is another user's")
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} is locked")
            time.sleep(_PAUSE_S)
        yield
    finally:
        os.close(descriptor)
