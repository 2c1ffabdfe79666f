"""The Ray Serve application: one deployment, which starts the cluster's actors and ends them with the application.

It has --api-replicas replicas. `emoe serve` runs it, and so does `serve deploy` with ServeConfig's keys as `args` and
`import_path: elastic_moe.deploy.launch.serve_app:build_app` (see serve.yaml). A replica finds or creates the
coordinator when it starts. When Serve stops the replicas because the *application* is being deleted, the last one stops
the coordinator and its actors. A replica that crashes, is replaced or moves leaves them alone, and its successor finds
them again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import uuid
from collections.abc import Callable
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from elastic_moe.actors.control.coordinator import Coordinator
from elastic_moe.actors.control.start import start_cluster, stop_cluster
from elastic_moe.actors.logs import LogSettings, set_up
from elastic_moe.actors.remote.ask import Remote, ask
from elastic_moe.actors.remote.calls import CALL_ERRORS, within
from elastic_moe.actors.remote.key_value import RayKeyValue
from elastic_moe.actors.telemetry.exporting import check_installed
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import EmoeError
from elastic_moe.cluster.keys import with_keys
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.generation.check_in import check_in
from elastic_moe.deploy.generation.gcs_watch import GcsWatch, limit_s
from elastic_moe.deploy.generation.ray_backend import RayBackend
from elastic_moe.deploy.launch.builtin import MODEL_DIR
from elastic_moe.deploy.launch.ray_private import keep_grpc_local
from elastic_moe.deploy.text.prompts import BoundedPrompts
from elastic_moe.deploy.text.tokenizer import without_torch
from elastic_moe.deploy.text.tokenizer_process import TokenizerProcess
from elastic_moe.deploy.web.old_http import serve_old_http

RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"

StartCluster = Callable[[ServeConfig, str], Remote[Coordinator]]

MAX_ONGOING_REQUESTS = 10_000
"""More requests than the engine accepts, because requests must queue in the engine and not in Serve."""
LOAD_TIMEOUT_S = 30.0
"""A replica whose tokenizer takes longer to load answers /health and /ready meanwhile, and refuses everything else."""
STOP_TIMEOUT_S = 10.0
"""Seconds that the actors have to end."""


@serve.ingress()
class Api:
    """One replica. It serves HTTP, has the tokenizer, and keeps the requests that it has accepted."""

    def __init__(self, settings: dict[str, Any], model_dir: str, start: StartCluster = start_cluster) -> None:
        """`start` finds or makes the coordinator; tests give a function of their own in place of `start_cluster`."""
        config = ServeConfig.from_mapping(settings)
        set_up("api", LogSettings.of(config))
        keep_grpc_local()
        serve_old_http()
        self._coordinator = start(config, model_dir)
        self._name = uuid.uuid4().hex
        """As the coordinator knows this replica."""
        self._backend = RayBackend(
            self._coordinator,
            plan_deadline_s=config.plan_deadline,
            recovery_timeout_s=config.recovery_timeout,
            gcs=GcsWatch(ray.get_runtime_context().gcs_address, limit_s(os.environ.get(RECONNECT))),
        )
        self._service = Service(config, self._backend, model_dir, BoundedPrompts.open, RayKeyValue())
        self._tasks: list[asyncio.Task[None]] = []

    async def __serve_build_asgi_app__(self) -> FastAPI:
        self._backend.begin()
        loading = asyncio.create_task(self._load())
        work = (
            self._service.following.watch(),
            self._service.metrics.share(self._backend),
            check_in(self._coordinator, self._name, self._service),
        )
        self._tasks = [loading, *map(asyncio.create_task, work)]
        # Serve sends requests here from the end of this call on, though other replicas may be able to answer them
        await asyncio.wait([loading], timeout=LOAD_TIMEOUT_S)
        return create_app(self._service)

    async def _load(self) -> None:
        await asyncio.to_thread(without_torch)
        await self._service.begin()

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._service.close()
        await self._backend.end()
        await asyncio.to_thread(self._service.close)
        if await asyncio.to_thread(_application_is_going) and not await self._others():
            await asyncio.to_thread(stop_cluster, STOP_TIMEOUT_S)

    async def _others(self) -> int:
        """Number of other replicas, whose requests still need the cluster."""
        try:
            return await within(ask(self._coordinator, Coordinator.check_out, self._name), STOP_TIMEOUT_S)
        except CALL_ERRORS:
            return 0


def build_app(args: dict[str, Any]) -> Application:
    """Make the application for `serve deploy` from ServeConfig's keys.

    Raises ConfigError for a wrong key or value, and CheckpointError for a model that cannot be served.
    """
    config = with_keys(ServeConfig.from_mapping(args, source="args"), os.environ)
    check_installed(config)
    model_dir = config.model or str(MODEL_DIR)
    # imported here, because replicas need no torch
    from elastic_moe.model.checkpoints.checkpoint import open_checkpoint

    open_checkpoint(model_dir)
    with TokenizerProcess(model_dir, config.chat_template) as process:
        process.wait()
    return application(config, model_dir)


def application(config: ServeConfig, model_dir: str, start: StartCluster = start_cluster) -> Application:
    make_deployment: Any = serve.deployment(
        name="api",
        num_replicas=config.api_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=config.shutdown_timeout + STOP_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=5,
    )
    app: Application = make_deployment(Api).bind(dataclasses.asdict(config), model_dir, start)
    return app


def _application_is_going() -> bool:
    """Whether Serve deletes this replica's application, and does not just replace the replica."""
    try:
        name = serve.get_replica_context().app_name
        status = serve.status().applications.get(name)
    except (RuntimeError, EmoeError, serve.exceptions.RayServeException):
        return True
    return status is None or status.status == "DELETING"
