"""Starting and stopping the whole, from a process that is connected to Ray."""

from __future__ import annotations

import contextlib

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from elastic_moe.actors import names
from elastic_moe.actors.control.coordinator import Coordinator
from elastic_moe.actors.control.fleet import ON_HEAD, RayFleet, clear
from elastic_moe.actors.remote.ask import Remote, ask, kill, wait
from elastic_moe.cluster.config import ServeConfig


def start_cluster(config: ServeConfig, model_dir: str, fleet: RayFleet | None = None) -> Remote[Coordinator]:
    """The coordinator's handle: of the one that runs, or of a new one. Returns at once; ask `readiness()`.

    It is detached: it and its workers outlive this process, until `stop_cluster`.
    """
    return Remote(
        ray.remote(Coordinator)
        .options(
            name=names.COORDINATOR,
            namespace=names.NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources=ON_HEAD,
            max_restarts=-1,
            # a call that its death cut off is made again to its successor: an engine's report must not be lost
            max_task_retries=-1,
            max_concurrency=1000,
        )
        .remote(config, model_dir, fleet or RayFleet(config))
    )


def stop_cluster(timeout_s: float) -> None:
    """End the coordinator and all that it made. Harmless where there is none. Blocks up to `timeout_s`."""
    with contextlib.suppress(ValueError):  # there is none
        coordinator = Remote[Coordinator](ray.get_actor(names.COORDINATOR, namespace=names.NAMESPACE))
        with contextlib.suppress(GetTimeoutError, RayActorError):
            wait(ask(coordinator, Coordinator.shutdown), timeout_s)
        kill(coordinator)
    clear()
