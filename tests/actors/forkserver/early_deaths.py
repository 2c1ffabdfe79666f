"""A driver of Ray that kills processes of actors before they register, run as a process of its own.

Prints a line of JSON for the test. Takes a directory for Ray's files, short enough for sockets.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import ray

from elastic_moe.actors.forkserver import setup_worker
from elastic_moe.actors.forkserver.request import NAME
from elastic_moe.actors.forkserver.stages import command_of_models
from elastic_moe.deploy.launch import ray_private
from tests.actors.forkserver.driver import start_ray
from tests.actors.forkserver.harness import wait

LIBRARY = "_raylet.so"
"""A process is killed when it has loaded this: a watcher stands by then, and it has not registered yet. Forks have
loaded it, and are killed as soon as they are seen."""


class Actor:
    def pid(self) -> int:
        return os.getpid()


def raylet() -> psutil.Process:
    (found,) = (child for child in psutil.Process().children(recursive=True) if child.name() == "raylet")
    return found


def starting() -> list[psutil.Process]:
    """The raylet's children that have not registered, apart from its agents, which rename themselves like workers."""
    return [child for child in raylet().children() if "--worker-id" in read(child, "cmdline")]


def forks() -> list[psutil.Process]:
    """The fork server's children that have not registered."""
    children = [child for server in servers() for child in server.children()]
    return [child for child in children if not read(child, "cmdline").startswith("ray::")]


@cache
def servers() -> list[psutil.Process]:
    """The fork servers, which stay."""
    return list(ours(NAME))


def read(process: psutil.Process, file: str) -> str:
    """A file of /proc about the process; empty where that has gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/{file}").read_text(errors="replace")
    return ""


def ours(name: str = "") -> Iterator[psutil.Process]:
    """Processes of this raylet that have this name, or any, whoever their parent is."""
    number = str(raylet().pid)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_RAYLET_PID") == number and name in ("", process.name()):
                yield process


def killing(find: Callable[[], list[psutil.Process]], number: int) -> int:
    """Kill so many processes soon after they have begun. Returns how many died."""
    killed = set[psutil.Process]()
    deadline = time.monotonic() + 20
    while len(killed) < number and time.monotonic() < deadline:
        for process in find():
            if process not in killed and LIBRARY in read(process, "maps"):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    killed.add(process)
        time.sleep(0.01)
    return len(killed)


def start(number: int, **options: Any) -> list[Any]:
    made: Any = ray.remote(Actor)
    return [made.options(num_cpus=0, **options).remote() for _ in range(number)]


def answers(actors: list[Any]) -> int:
    """Number of actors that answer before long."""
    ready, _ = ray.wait([actor.pid.remote() for actor in actors], num_returns=len(actors), timeout=40)
    return len(set(ray.get(ready)))


def main() -> None:
    os.environ |= {"RAY_worker_register_timeout_seconds": "600"}
    ray_private.watch_starts()
    start_ray(sys.argv[1])
    wait(lambda: not starting())
    seen: dict[str, Any] = {}
    # more than the idle processes that Ray keeps; without help, two that are lost keep all others from starting
    actors = start(6)
    seen["plain"] = (killing(starting, 2), answers(actors))
    forked = {"runtime_env": {"py_executable": command_of_models()}}
    actors = start(2, **forked)
    seen["preparing"] = (killing(starting, 2), answers(actors))
    actors = start(2, **forked)
    seen["forked"] = (killing(forks, 2), answers(actors))
    time.sleep(1)
    seen["watchers"] = len(list(ours(setup_worker.NAME)))
    sys.stdout.write(json.dumps(seen) + "\n")
    sys.stdout.flush()
    for process in [*ours(), *psutil.Process().children(recursive=True)]:
        process.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
