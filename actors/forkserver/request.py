"""What a launcher and a fork of the server say to each other, over a connection on one machine.

    launcher -> fork   Request, with the descriptors of standard input, output and error, of the current directory, and
                       of the watcher's pipe where a watcher stands by (setup_worker.py)
    fork -> launcher   Answer: yes, or why not
    launcher -> fork   GO. A fork that does not get it ends: a launcher that waits no longer starts Python itself.

Only the standard library is imported here: a launcher should start fast.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

GO = b"go"
NAME = "emoe-forkserver"
"""What a fork server calls itself: who lists processes sees it."""
DESCRIPTORS = (4, 5)
"""Without a watcher, and with one."""
MOST_BYTES = 4 << 20
"""Of a request. An environment with its arguments has 2 MB at most on Linux, unless a limit was raised."""
_LENGTH = struct.Struct("<I")
_PEER = struct.Struct("3i")
_FILES = ("cgroup", "oom_score_adj", "uid_map", "timerslack_ns")
"""Files of /proc/self whose contents a process has from the one that started it."""
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


R = TypeVar("R", "Request", "Answer")


class Stage(NamedTuple):
    """What a fork server has imported: a later stage has what earlier ones have that were started with it."""

    name: str
    """A part of its socket's name."""
    modules: Sequence[str]
    model: bool
    """Whether it imports the model's code as well."""


class Request(NamedTuple):
    arguments: list[str]
    """A script of Python and its arguments."""
    search_path: list[str]
    """Where Python looks for modules, after the script's folder."""
    environment: dict[str, str]
    surroundings: dict[str, str]
    """What `surroundings` returns for the launcher."""
    process_group: int
    umask: int


class Answer(NamedTuple):
    pid: int
    refusal: str
    """Why the fork cannot stand for the launcher; empty if it can."""


def surroundings() -> dict[str, str]:
    """What this process has from the one that started it, and cannot take from another: a value for each name. A fork
    stands for a launcher with equal ones only."""
    ignored = [int(number) for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN]
    blocked = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
    found = {
        "user": (os.getresuid(), os.getresgid(), sorted(os.getgroups())),
        "session": os.getsid(0),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "scheduling": os.sched_getscheduler(0),
        "cores": sorted(os.sched_getaffinity(0)),
        "limits": limits,
        "signals": (sorted(ignored), blocked),
        "python": (sys.executable, sys.prefix, sys.version),
    }
    found |= {name: _text_of(name) for name in _FILES}
    found |= {f"namespace {name}": _link_of(f"ns/{name}") for name in _NAMESPACES}
    return {name: str(value) for name, value in found.items()}


def differences(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """The names that only one has, or whose values differ."""
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


def name_process(name: str) -> None:
    """What `ps` and `top` call this process: at most 15 characters."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(name)


def is_server(pid: int) -> bool:
    """Whether the process is a fork server, by its name."""
    return _text_of("comm", str(pid)).rstrip("\n") == NAME


def _text_of(name: str, process: str = "self") -> str:
    try:
        with open(f"/proc/{process}/{name}") as file:
            return file.read()
    except OSError:
        return ""


def _link_of(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/{name}")
    except OSError:
        return ""


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """The process and the user at the other end; for a connection that we opened, those that listened there last."""
    pid, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(pid), int(user)


def send(connection: socket.socket, value: Request | Answer, descriptors: list[int] | None = None) -> None:
    """Send the value, and copies of the descriptors with its first byte. Raises OSError."""
    text = json.dumps(value).encode()
    head = _LENGTH.pack(len(text))
    if descriptors:
        socket.send_fds(connection, [head[:1]], descriptors)
        head = head[1:]
    connection.sendall(head + text)


def receive_request(connection: socket.socket) -> tuple[Request, list[int]]:
    """The request and its descriptors. Raises OSError where the connection ends or is late, and ValueError where
    something else comes."""
    first, descriptors, _, _ = socket.recv_fds(connection, 1, max(DESCRIPTORS))
    if len(descriptors) not in DESCRIPTORS:
        raise ValueError(f"expected {DESCRIPTORS[0]} or {DESCRIPTORS[1]} descriptors, got {len(descriptors)}")
    return _made(Request, _value(connection, first)), descriptors


def receive_answer(connection: socket.socket) -> Answer:
    """Raises as `receive_request` does."""
    return _made(Answer, _value(connection, b""))


def _made(kind: type[R], value: list[Any]) -> R:
    try:
        return kind(*value)
    except TypeError:
        raise ValueError(f"expected a {kind.__name__}, got {len(value)} values") from None


def _value(connection: socket.socket, first: bytes) -> list[Any]:
    (length,) = _LENGTH.unpack(first + receive(connection, _LENGTH.size - len(first)))
    if length > MOST_BYTES:
        raise ValueError(f"expected at most {MOST_BYTES} bytes, got {length}")
    value = json.loads(receive(connection, length))
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {type(value).__name__}")
    return value


def receive(connection: socket.socket, length: int) -> bytes:
    """So many bytes. Raises OSError where the connection ends before, or is late."""
    received = b""
    while len(received) < length:
        part = connection.recv(length - len(received))
        if not part:
            raise ConnectionResetError("the other end has closed the connection")
        received += part
    return received
