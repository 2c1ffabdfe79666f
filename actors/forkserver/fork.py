"""What a fork of the server does before it is a worker: it takes over what its launcher has."""

from __future__ import annotations

import os
import runpy
import socket
import sys

from numpy import random

from elastic_moe.actors.forkserver.origin import note_fork
from elastic_moe.actors.forkserver.request import (
    DESCRIPTORS,
    GO,
    Answer,
    Request,
    differences,
    name_process,
    receive,
    receive_request,
    send,
)
from elastic_moe.actors.forkserver.setup_worker import be_watched

_OF_NO_IMPORT = ("_", "OLDPWD", "PWD", "SHLVL", "RAY_JOB_ID")
"""Variables that a shell sets for itself, and one that Ray reads when a worker begins: no import reads them."""
REQUEST_S = 10.0
"""Seconds that a launcher has for its request and for its word to go."""


def become_worker(connection: socket.socket, surroundings: dict[str, str], environment: dict[str, str]) -> None:
    """Run the script of the launcher at the other end, as its process would; end where the launcher does not want that.

    surroundings, environment: those with which the server has imported.
    """
    server = os.getppid()
    try:
        request, descriptors = agree(connection, surroundings, environment)
    except (OSError, ValueError):
        # the launcher sees the end of its connection, and starts Python itself
        os._exit(0)
    connection.close()
    take_over(request, descriptors)
    note_fork(os.environ, server)
    runpy.run_path(request.arguments[0], run_name="__main__")


def agree(
    connection: socket.socket, surroundings: dict[str, str], environment: dict[str, str]
) -> tuple[Request, list[int]]:
    """The request that is to be carried out, with its descriptors.

    Raises OSError where the launcher goes or is late, and ValueError where it asks what this process cannot be.
    """
    connection.settimeout(REQUEST_S)
    request, descriptors = receive_request(connection)
    refusal = _refusal(request, surroundings, environment)
    if not refusal:
        # as long as the launcher waits, its process group exists
        os.setpgid(0, request.process_group)
    send(connection, Answer(os.getpid(), refusal))
    if refusal:
        raise ValueError(refusal)
    receive(connection, len(GO))
    return request, descriptors


def _refusal(request: Request, surroundings: dict[str, str], environment: dict[str, str]) -> str:
    names = [name for name in differences(environment, request.environment) if name not in _OF_NO_IMPORT]
    if names:
        # libraries have read it while they were imported
        return f"the fork server's environment differs in {', '.join(names)}"
    if names := differences(surroundings, request.surroundings):
        return f"the fork server's process differs in {', '.join(names)}"
    return ""


def take_over(request: Request, descriptors: list[int]) -> None:
    """Make this process what the launcher's would be when it begins to run the script."""
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
    os.fchdir(descriptors[3])
    for descriptor in descriptors[: DESCRIPTORS[0]]:
        os.close(descriptor)
    os.umask(request.umask)
    os.environ.clear()
    os.environ.update(request.environment)
    for descriptor in descriptors[DESCRIPTORS[0] :]:
        be_watched(os.environ, descriptor)
    name_process(os.path.basename(sys.executable))
    sys.argv[:] = request.arguments
    sys.orig_argv[:] = [sys.executable, *request.arguments]
    sys.path[:] = [os.path.dirname(request.arguments[0]), *request.search_path]
    # Python's own generator has a new seed after a fork, numpy's has not
    random.seed()
