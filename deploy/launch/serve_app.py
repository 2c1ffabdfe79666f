"""The Ray Serve application: its API starts the cluster's actors, and ends them with the application.

The API has --api-replicas replicas. `emoe serve` runs it, and so does `serve deploy` with ServeConfig's keys as `args`
and `import_path: elastic_moe.deploy.launch.serve_app:build_app` (see serve.yaml). A replica finds or creates the
coordinator when it starts. When Serve stops the replicas because the *application* is being deleted, the last one
stops the coordinator and its actors. A replica that crashes, is replaced or moves leaves them alone, and its successor
finds them again.

A redeploy makes new replicas beside the old ones (max_surge_percent). With the same model they find the cluster that
serves and have it take over the settings. With another one they start a cluster of its own (cluster/redeploy.py), and
are ready only when that one can serve: then Serve sends requests to them, ends the old replicas, and with them the old
cluster (cluster/control/succession.py). Where the new cluster needs the resources of the old one, the new replicas are
ready at once, and requests wait in them until it can serve.

Serve takes a replica for healthy as soon as it answers, and /ready has to be answered while the model loads. So there
is a second deployment, Model, of one process that does nothing but be ready when /ready is: by it, the application's
state in Serve, and KubeRay's view, follow /ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import uuid
from collections.abc import Callable
from typing import Any

import psutil
import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.coordinator.fleet import ON_HEAD
from elastic_moe.actors.coordinator.start import start_groups, stop_cluster, stop_unused_clusters
from elastic_moe.actors.description import describe
from elastic_moe.actors.logs import LogSettings, set_up
from elastic_moe.actors.names import COORDINATOR
from elastic_moe.actors.remote import generations, ray_nodes
from elastic_moe.actors.remote.ask import Remote, ask
from elastic_moe.actors.remote.calls import CALL_ERRORS, one_line, within
from elastic_moe.actors.remote.key_value import API_NAMESPACE, RayKeyValue
from elastic_moe.actors.telemetry.exporting import check_installed
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.decisions.limits import check_groups, check_limits
from elastic_moe.cluster.errors import EmoeError, NotReadyError
from elastic_moe.cluster.keys import with_keys
from elastic_moe.cluster.messages.views import Readiness
from elastic_moe.cluster.nodes import all_cores
from elastic_moe.cluster.redeploy import cluster_of, generation_of, group_name
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.backend.check_in import check_in
from elastic_moe.deploy.backend.directory import RayDirectory
from elastic_moe.deploy.backend.gcs_watch import GcsWatch, limit_s
from elastic_moe.deploy.backend.groups import Groups, together
from elastic_moe.deploy.backend.hand_over import READY_POLL_S, ready, take_over
from elastic_moe.deploy.backend.ray_backend import RayBackend
from elastic_moe.deploy.launch.builtin import MODEL_DIR
from elastic_moe.deploy.launch.ray_private import keep_grpc_local
from elastic_moe.deploy.text.prompts import BoundedPrompts
from elastic_moe.deploy.text.tokenizer import without_torch
from elastic_moe.deploy.text.tokenizer_process import TokenizerProcess
from elastic_moe.deploy.tools.form import check_parsers
from elastic_moe.deploy.web.direct import serve_directly

RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"

StartGroups = Callable[[ServeConfig, str], list[Remote[Coordinator]]]

MAX_ONGOING_REQUESTS = 10_000
"""More requests than the engine accepts, because requests must queue in the engine and not in Serve."""
LOAD_TIMEOUT_S = 30.0
"""A replica whose tokenizer takes longer to load answers /health and /ready meanwhile, and refuses everything else."""
HEALTH_PERIOD_S = 5
BESIDE_PROXY = {"num_cpus": 0, "resources": ON_HEAD}
"""Ray's options for a process on the head, where HTTP comes in: elsewhere, the loss of a worker's node would end
connections, and Ray's autoscaler, which counts a node with such a process as idle, would remove it."""
STOP_TIMEOUT_S = 10.0
"""Seconds that the actors have to end."""


@serve.ingress()
class Api:
    """One replica. It serves HTTP, has the tokenizer, and keeps the requests that it has accepted."""

    def __init__(
        self, settings: dict[str, Any], model_dir: str, start: StartGroups = start_groups, model: Any = None
    ) -> None:
        """`start` finds or makes the groups' coordinators; tests give a function of their own for `start_groups`.

        model: the deployment Model, where the application may be redeployed.
        """
        config = ServeConfig.from_mapping(settings)
        set_up("api", LogSettings.of(config))
        keep_grpc_local()
        serve_directly()
        self._config = config
        self._generation = generation_of(config, model_dir)
        self._redeployable = model is not None
        coordinators = start(config, model_dir)
        self._name = uuid.uuid4().hex
        """The name by which the coordinators know this replica."""
        self._gcs = GcsWatch(ray.get_runtime_context().gcs_address, limit_s(os.environ.get(RECONNECT)))
        self._directory = RayDirectory(config, model_dir, coordinators, joined=self._redeployable)
        self._backend = Groups(len(coordinators), self._group, self._directory, self._name)
        self._service = Service(
            config, self._backend, model_dir, BoundedPrompts.open, RayKeyValue(API_NAMESPACE), self._generation, _lives
        )
        self._tasks: list[asyncio.Task[None]] = []

    def _group(self, number: int, lost: Callable[[], None]) -> RayBackend:
        return RayBackend(
            self._directory.coordinators[number],
            recovery_timeout_s=self._config.recovery_timeout,
            gcs=self._gcs,
            number=number,
            lost=lost,
            reports=lambda coordinator: check_in(coordinator, self._name, self._service),
        )

    async def __serve_build_asgi_app__(self) -> FastAPI:
        self._backend.begin()
        loading = asyncio.create_task(self._load())
        work = (
            self._service.following.watch(),
            self._service.metrics.share(self._backend.engine),
        )
        self._tasks = [loading, *map(asyncio.create_task, work)]
        # Serve sends requests here from the end of this call on, though other replicas may be able to answer them
        await asyncio.wait([loading], timeout=LOAD_TIMEOUT_S)
        if self._redeployable and await take_over(
            self._config, self._generation, self._directory.coordinators, self._service.readiness, generations
        ):
            self._backend.expect_service()
        return create_app(self._service)

    async def check_health(self) -> None:
        """Serve replaces a replica that can never serve."""
        self._service.check_health()

    async def _load(self) -> None:
        await asyncio.to_thread(without_torch)
        await self._service.begin()

    async def __del__(self) -> None:
        if await self._is_replaced():
            # no other replica can finish what this one follows
            await self._finish_responses()
        for task in self._tasks:
            task.cancel()
        self._service.close()
        await self._backend.end()
        await asyncio.to_thread(self._service.close)
        # asked in any case, since it also says that this replica ends
        others = await self._backend.check_out(STOP_TIMEOUT_S)
        if await asyncio.to_thread(_application_is_going) and not others:
            await asyncio.to_thread(stop_cluster, STOP_TIMEOUT_S, self._generation)
            await asyncio.to_thread(stop_unused_clusters, STOP_TIMEOUT_S)

    async def _is_replaced(self) -> bool:
        """Whether a redeploy wants another cluster."""
        with contextlib.suppress(*CALL_ERRORS):
            return await asyncio.to_thread(generations.wanted) not in (None, self._generation)
        return False

    async def _finish_responses(self) -> None:
        self._service.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.shutdown_timeout):
                while len(self._service.following):
                    await asyncio.sleep(READY_POLL_S)


class Model:
    """It is ready when /ready is, and Serve takes it for unhealthy while /ready is not. It does nothing else."""

    async def __init__(  # type: ignore[misc]
        self, settings: dict[str, Any], model_dir: str, start: StartGroups = start_groups
    ) -> None:
        """Returns once the cluster can serve. Raises NotReadyError, with the reason, if it never can."""
        config = ServeConfig.from_mapping(settings)
        set_up("model", LogSettings.of(config))
        self._generation, self._groups = generation_of(config, model_dir), config.data_parallel_size
        self._coordinators = await asyncio.to_thread(start, config, model_dir)
        # one that could not serve tries again
        for coordinator in self._coordinators:
            await within(ask(coordinator, Coordinator.reconfigure, config), config.recovery_timeout)
        while not (state := await self._readiness()).ready:
            if state.error is not None:
                raise NotReadyError(state.error)
            await asyncio.sleep(READY_POLL_S)

    async def _readiness(self) -> Readiness:
        await asyncio.to_thread(self._find_others)
        return together([await self._state(coordinator) for coordinator in self._coordinators])

    def _find_others(self) -> None:
        """Find the coordinators of the groups that have begun to start meanwhile. Blocks."""
        for number in range(len(self._coordinators), self._groups):
            coordinator = generations.find(group_name(self._generation, number), COORDINATOR)
            if coordinator is None:
                return
            self._coordinators.append(coordinator)

    async def _state(self, coordinator: Remote[Coordinator]) -> Readiness:
        try:
            return await ready(coordinator)
        except CALL_ERRORS as error:
            return Readiness(ready=False, reason=f"the coordinator does not answer: {one_line(error)}")

    async def check_health(self) -> None:
        """Serve calls this every few seconds; it raises while the cluster cannot serve."""
        state = await self._readiness()
        if not state.ready:
            raise NotReadyError(state.reason)


def build_app(args: dict[str, Any]) -> Application:
    """Make the application for `serve deploy` from ServeConfig's keys.

    Raises ConfigError for a wrong key or value, and CheckpointError for a model that cannot be served.
    """
    config = with_keys(ServeConfig.from_mapping(args, source="args"), os.environ)
    check_installed(config)
    check_parsers(config)
    model_dir = config.model or str(MODEL_DIR)
    check_limits(config, describe(model_dir))
    # Serve runs this on the cluster's head, or on a machine of its own cluster
    check_groups(
        dataclasses.replace(config, address="auto"),
        cores=len(os.sched_getaffinity(0)),
        all_cores=all_cores(ray_nodes.nodes()) if ray.is_initialized() else None,
        free_bytes=psutil.virtual_memory().available,
    )
    with TokenizerProcess(model_dir, config.chat_template) as process:
        process.wait()
    return application(config, model_dir, redeployable=True)


def application(
    config: ServeConfig, model_dir: str, start: StartGroups = start_groups, *, redeployable: bool = False
) -> Application:
    """redeployable: Serve waits for the model, and hands over from one deployment to the next."""
    make_deployment: Any = serve.deployment(
        name="api",
        num_replicas=config.api_replicas,
        ray_actor_options=BESIDE_PROXY,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=config.shutdown_timeout + STOP_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=HEALTH_PERIOD_S,
        # a redeploy ends no replica before its successor is ready
        max_surge_percent=100,
    )
    make_model: Any = serve.deployment(
        name="model",
        num_replicas=1,
        ray_actor_options=BESIDE_PROXY,
        health_check_period_s=HEALTH_PERIOD_S,
        max_surge_percent=100,
    )
    given = (dataclasses.asdict(config), model_dir, start)
    app: Application = make_deployment(Api).bind(*given, make_model(Model).bind(*given) if redeployable else None)
    return app


async def _lives(generation: str) -> bool:
    """Whether this cluster has a coordinator, so that its replicas may still finish what they have begun."""
    return any(cluster_of(name) == generation for name in await asyncio.to_thread(generations.coordinators))


def _application_is_going() -> bool:
    """Whether Serve deletes this replica's application, and does not just replace the replica."""
    try:
        name = serve.get_replica_context().app_name
        status = serve.status().applications.get(name)
    except (RuntimeError, EmoeError, serve.exceptions.RayServeException):
        return True
    return status is None or status.status == "DELETING"
