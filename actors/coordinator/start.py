"""Starting and stopping the whole, from a process that is connected to Ray."""

from __future__ import annotations

import contextlib

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from elastic_moe.actors import names
from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.coordinator.fleet import ON_HEAD, RayFleet
from elastic_moe.actors.remote import generations
from elastic_moe.actors.remote.ask import Remote, ask, kill, wait
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.redeploy import Generation, generation_of


def start_cluster(config: ServeConfig, model_dir: str, fleet: RayFleet | None = None) -> Remote[Coordinator]:
    """The handle of the coordinator for this model and these settings: of the one that runs, or of a new one.

    This cluster is the wanted one from now on. Returns at once; ask `readiness()`. A coordinator that runs may have
    other settings of `cluster.redeploy.LIVE`: tell it by `reconfigure`. It is detached: it and its workers outlive this
    process, until `stop_cluster`.
    """
    fleet = fleet or RayFleet(config, generation_of(config, model_dir))
    generations.announce(fleet.generation)
    return Remote(
        ray.remote(Coordinator)
        .options(
            name=names.COORDINATOR,
            namespace=names.namespace_of(fleet.generation),
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources=ON_HEAD,
            max_restarts=-1,
            # a call that its death cut off is made again to its successor: an engine's report must not be lost
            max_task_retries=-1,
            max_concurrency=1000,
        )
        .remote(config, model_dir, fleet)
    )


def stop_cluster(timeout_s: float, generation: Generation | None = None) -> None:
    """End the coordinator of one cluster, or of every one, and all that it made. Harmless where there is none.

    Blocks up to `timeout_s` for each.
    """
    found = generations.coordinators()
    ending = set(found) if generation is None else {generation}
    # without any, what an earlier one has left is ended
    for name in ending or {Generation("")}:
        if (coordinator := found.get(name)) is not None:
            with contextlib.suppress(GetTimeoutError, RayActorError):
                wait(ask(coordinator, Coordinator.shutdown), timeout_s)
            kill(coordinator)
        generations.clear(name)
    if not set(found) - ending:
        generations.forget_wanted()


def stop_unused_clusters(timeout_s: float) -> None:
    """End the clusters that no API replica uses, because the application is being deleted. Blocks, as `stop_cluster`.

    A cluster that was about to take over, and whose first replica was still starting, is such a one.
    """
    for name, coordinator in generations.coordinators().items():
        with contextlib.suppress(GetTimeoutError, RayActorError):
            if wait(ask(coordinator, Coordinator.check_out, ""), timeout_s):
                continue
        stop_cluster(timeout_s, name)
