"""Starting and stopping the whole, from a process that is connected to Ray."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from ray.exceptions import GetTimeoutError, RayActorError

from elastic_moe.actors import names
from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.coordinator.fleet import ON_HEAD, RayFleet
from elastic_moe.actors.liveness import CALL_TIMEOUT_S
from elastic_moe.actors.remote import generations, ray_nodes
from elastic_moe.actors.remote.ask import Remote, ask, kill, remote_form, wait
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.nodes import CPU
from elastic_moe.cluster.redeploy import Generation, cluster_of, generation_of, group_name, number_of


def start_groups(
    config: ServeConfig, model_dir: str, *, alone: bool = False, model: ModelInfo | None = None
) -> list[Remote[Coordinator]]:
    """The coordinators of the first groups of the cluster for this model and these settings, as `start_cluster` returns
    them: of those that run, and of as many as may start at a time. The others start when these are ready
    (`start_further_groups`), as do those that an admin call has added.

    alone, model: as RayFleet has them.
    """
    generation = generation_of(config, model_dir)
    most = min(generations.number_of_groups(generation, config.data_parallel_size), config.data_parallel_size)
    # an API replica finds those that the main process has made, and makes none that may have to be made otherwise
    begins = groups_at_once(config.workers, alone=True) if alone else 1
    known = set(generations.coordinators()) if most > begins else set()
    found = []
    for number in range(most):
        name = group_name(generation, number)
        if number >= begins and name not in known:
            break
        found.append(start_cluster(config, model_dir, RayFleet(config, name, alone=alone, model=model)))
    return found


def groups_at_once(workers: int, *, alone: bool) -> int:
    """Number of groups that may start at a time: each of their workers has a core for its imports and its weights, so
    that the first ones serve as soon as they can. Blocks for a call to GCS unless `alone` (as RayFleet has it).

    workers: of a group.
    """
    cores = len(os.sched_getaffinity(0)) if alone else sum(node.total.get(CPU, 0.0) for node in ray_nodes.nodes())
    return max(1, int(cores) // workers)


def start_further_groups(
    known: Sequence[Remote[Coordinator]], config: ServeConfig, model_dir: str, number: int
) -> list[Remote[Coordinator]]:
    """The coordinators of the first `number` groups, of which those in `known` run. Blocks.

    Raises what Ray raises where the first one does not answer.
    """
    found = list(known[:number])
    for group in range(len(found), number):
        fleet = wait(ask(known[0], Coordinator.fleet_beside, group), CALL_TIMEOUT_S)
        assert isinstance(fleet, RayFleet)
        found.append(start_cluster(config, model_dir, fleet))
    return found


def start_cluster(config: ServeConfig, model_dir: str, fleet: RayFleet) -> Remote[Coordinator]:
    """The handle of a group's coordinator for this model and these settings: of the one that runs, or of a new one.

    This cluster is the wanted one from now on. Returns at once; ask `readiness()`. A coordinator that runs may have
    other settings of `cluster.redeploy.LIVE`: tell it by `reconfigure`. It is detached: it and its workers outlive this
    process, until `stop_cluster`.
    """
    generations.announce(cluster_of(fleet.generation))
    return Remote(
        remote_form(Coordinator)
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
    """End the coordinators of one cluster, or of every one, and all that they made. Harmless where there is none.

    Blocks up to `timeout_s` for each group.
    """
    found = generations.coordinators()
    ending = {name for name in found if generation in (None, cluster_of(name))}
    # without any, what an earlier one has left is ended
    for name in sorted(ending) or [generation or Generation("")]:
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
        # all replicas of a cluster use its first group
        if number_of(name):
            continue
        with contextlib.suppress(GetTimeoutError, RayActorError):
            if wait(ask(coordinator, Coordinator.check_out, ""), timeout_s):
                continue
        stop_cluster(timeout_s, name)
