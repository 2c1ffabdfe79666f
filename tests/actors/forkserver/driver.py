"""A driver of Ray with actors whose processes are forked, run as a process of its own: a process has one Ray at a time.

Prints a line of JSON for the test: what was seen. Takes a directory for Ray's files, short enough for sockets.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError

from elastic_moe.actors.forkserver.origin import origin
from elastic_moe.actors.forkserver.stages import command_of_models
from tests.actors.forkserver.harness import gone, wait


class Worker:
    def describe(self) -> dict[str, Any]:
        import torch

        # more than one thread's work
        product = torch.ones(300, 300) @ torch.ones(300, 300)
        sys.stderr.write(f"a line of {os.getpid()}\n")
        return {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "origin": origin(os.environ),
            "threads": torch.get_num_threads(),
            "product": float(product.sum()),
            "title": Path("/proc/self/cmdline").read_text().split("\0")[0],
        }


def start(number: int) -> tuple[list[Any], list[dict[str, Any]]]:
    made: Any = ray.remote(Worker)
    actors = [
        made.options(num_cpus=0, runtime_env={"py_executable": command_of_models()}).remote() for _ in range(number)
    ]
    return actors, ray.get([actor.describe.remote() for actor in actors], timeout=120)


def death_seen(actor: Any) -> float:
    """Seconds until a call to an actor whose process has just ended fails."""
    begun = time.monotonic()
    try:
        ray.get(actor.describe.remote(), timeout=60)
    except RayActorError:
        return time.monotonic() - begun
    raise AssertionError("the actor answers")


def start_ray(directory: str) -> None:
    """Start a Ray of two cores, with its files in the directory."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=2,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=directory,
    )


def main() -> None:
    directory = sys.argv[1]
    start_ray(directory)
    actors, first = start(3)
    (server,) = {worker["parent"] for worker in first}
    psutil.Process(first[0]["pid"]).kill()
    seen_s = death_seen(actors[0])
    ray.kill(actors[1])
    wait(lambda: gone(first[1]["pid"]))
    # the server's death: its forks go on, and there are others from a new one
    psutil.Process(server).kill()
    wait(lambda: gone(server))
    again = ray.get(actors[2].describe.remote(), timeout=60)
    more, second = start(1)
    (log,) = Path(directory).glob(f"session_2*/logs/worker-*-{again['pid']}.err")
    lines = log.read_text().splitlines()
    (raylet,) = (child for child in psutil.Process().children(recursive=True) if child.name() == "raylet")
    raylet.kill()
    raylet.wait()
    wait(lambda: all(gone(pid) for pid in (second[0]["parent"], second[0]["pid"], again["pid"])))
    sys.stdout.write(json.dumps({
        "first": first, "again": again, "second": second, "death_seen_s": seen_s, "lines": lines,
    }) + "\n")  # fmt: skip
    sys.stdout.flush()
    del more
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
