"""Ray and Serve for one server on this machine: their environment, their start, and an end that leaves no process.

Ray Serve reads its settings from the environment when it is imported, here and in every process that Ray starts. So
the environment is set first, and ray is imported inside functions.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from elastic_moe.actors.names import NAMESPACE
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.deploy.launch.console import keep_ray_lines
from elastic_moe.deploy.launch.haproxy import INSIDE, write_haproxy
from elastic_moe.deploy.launch.ray_environment import (
    PATIENCE_S,
    home_settings,
    local_settings,
    patience,
    without_proxies,
)
from elastic_moe.deploy.launch.run_directory import RunDirectory
from elastic_moe.model import native

Started = Callable[[str, int], None]
"""(name, pid) of a process."""

APP_NAME = "emoe"
AGENTS_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
"""Ray's names of the ports on which a node's agents listen, and of the files that tell them."""
LEAST_SHARED_BYTES = 16 << 20
END_TIMEOUT_S = 5.0
"""How long processes get to end by themselves."""


class ServerProcesses:
    """What the main process starts for one server. `stop` is idempotent; what it leaves, the supervisor ends."""

    def __init__(self, config: ServeConfig, directory: RunDirectory, started: Started = lambda name, pid: None) -> None:
        """`started` is told of each process of a local Ray that nothing else replaces."""
        self._config = config
        self._directory = directory
        self._started = started
        self._connected = False
        self._owns_app = False
        """Whether the application and the actors on Ray are this server's."""
        self._behind_haproxy = False
        """Whether an HAProxy of our own listens at the server's address."""

    @property
    def local(self) -> bool:
        return self._config.address is None

    def start_ray(self) -> None:
        """Start a Ray of our own, or join the one at `config.address`. Raises UserError where it does not answer."""
        self._set_environment()
        if self.local:
            # compiled while Ray starts, should this machine not have it yet: workers wait for it
            threading.Thread(target=native.library, daemon=True).start()
        import ray

        _silence_ray()
        if self.local:
            _without_onlookers()
            _patient_ray(self._started)
        self._connected = True
        common: dict[str, Any] = {"namespace": NAMESPACE, "logging_level": logging.ERROR}
        # a Ray of our own needs no help: its processes share a log file with this one
        common["log_to_driver"] = not self.local
        if self.local:
            cpus = max(os.cpu_count() or 1, self._config.workers + 1)
            place = str(self._directory.ray)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=place, **common)
            return
        try:
            ray.init(address=self._config.address, **common)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise UserError(f"--address: cannot join {self._config.address}: {' '.join(str(error).split())}") from None

    def _set_environment(self) -> None:
        """To be called before ray is imported. What the user has set stays, but for proxies."""
        inherited = without_proxies(os.environ)
        if self.local:
            ports = {f"RAY_SERVE_FALLBACK_PROXY_{kind}_PORT": str(free_port()) for kind in ("HTTP", "GRPC")}
            haproxy = write_haproxy(
                self._directory.path, self._config, metrics_port=free_port(), stats_port=free_port()
            )
            wanted = local_settings(self._directory) | patience() | ports | haproxy
            # FORWARDED_ALLOW_IPS is uvicorn's; this server has a setting of that name
            own = {name: wanted[name] for name in ("RAY_TMPDIR", "TMPDIR", "FORWARDED_ALLOW_IPS")}
            inherited = wanted | inherited | own | home_settings(self._directory)
            used = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BINARY_PATH")
            self._behind_haproxy = all(name in haproxy and inherited[name] == haproxy[name] for name in used)
        else:
            # A cluster with another mode says so; plain ray.init() would turn tokens on and write a file.
            inherited.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.clear()
        os.environ.update(inherited | {"RAY_USAGE_STATS_ENABLED": "0"})

    def start_app(self, model_dir: str, model: ModelInfo) -> None:
        """Start Serve and the application. Returns once the API answers, while the model loads."""
        from ray import serve

        from elastic_moe.actors.control.fleet import RayFleet
        from elastic_moe.actors.control.start import start_cluster
        from elastic_moe.deploy.launch.serve_app import application

        self._check_unused()
        self._owns_app = True
        # the weights load while Serve starts; the API then finds the coordinator
        start_cluster(self._config, model_dir, RayFleet(self._config, model=model))
        for name in ("ray.serve", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        host = INSIDE if self._behind_haproxy else self._config.host
        options = {"host": host, "port": self._config.port, "request_timeout_s": None}
        serve.start(http_options=options, proxy_location="HeadOnly", logging_config={"enable_access_log": False})
        self._check_http()
        serve.run(application(self._config, model_dir), name=APP_NAME, route_prefix="/")

    def _check_http(self) -> None:
        """A joined cluster may have Serve running already, and then it listens where it was told first."""
        from ray.serve.context import _get_global_client

        client: Any = _get_global_client()
        there = client.http_config
        if there.port != self._config.port:
            raise UserError(
                f"--port: Ray Serve on {self._config.address} listens on port {there.port} already: "
                f"use --port {there.port}, or end it with `serve shutdown`"
            )

    def _check_unused(self) -> None:
        """Raises UserError where a joined cluster has a server of this project already: it must not be disturbed."""
        import ray

        from elastic_moe.actors.names import COORDINATOR

        try:
            ray.get_actor(COORDINATOR, namespace=NAMESPACE)
        except ValueError:
            return
        raise UserError(
            f"--address: a server runs on {self._config.address} already; end it, or what is left of it, with"
            " `serve shutdown` there"
        )

    def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for those under way. Harmless where nothing serves yet."""
        if not self._owns_app:
            return
        from ray import serve

        handle: Any = serve.get_app_handle(APP_NAME)
        deadline = time.monotonic() + timeout_s
        while handle.drain.remote().result(timeout_s=10) and time.monotonic() < deadline:
            time.sleep(0.1)
        # the last bytes of the last answer
        time.sleep(0.2)

    def stop(self) -> None:
        """End what was started, in good order. On a cluster that was joined: our application and our actors."""
        if not self._connected:
            return
        self._connected = False
        ours = psutil.Process().children(recursive=True) if self.local else []
        # Ray may wait for ever for a part of itself that is gone; then its processes are killed all the same.
        ending = threading.Thread(target=self._disconnect, daemon=True)
        ending.start()
        ending.join(3 * END_TIMEOUT_S)
        psutil.wait_procs(ours, timeout=END_TIMEOUT_S)

    def _disconnect(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            if ray.is_initialized() and self._owns_app:
                self._stop_actors()
        with contextlib.suppress(Exception):
            ray.shutdown()

    def _stop_actors(self) -> None:
        from elastic_moe.actors.control.start import stop_cluster

        stop_cluster(END_TIMEOUT_S)
        if not self.local:
            from ray import serve

            serve.delete(APP_NAME)
            if not serve.status().applications:
                serve.shutdown()  # type: ignore[no-untyped-call]


def _silence_ray() -> None:
    """Ray prints a paragraph here for every process that dies; the coordinator tells it in a line."""
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = keep_ray_lines


def _without_onlookers() -> None:
    """Leave out the processes that watch Ray for people: each costs half a second to start, and some never rests.

    Logs stay in their files, nobody asks this Ray for nodes, and the application has metrics of its own.
    """
    from ray._private.node import Node

    def no_dashboard(node: Any, **_: Any) -> None:
        node._webui_url = ""

    for name, stand_in in (
        ("start_log_monitor", lambda _: None),
        ("start_monitor", lambda _: None),
        ("start_api_server", no_dashboard),
    ):
        if hasattr(Node, name):
            setattr(Node, name, stand_in)


def _patient_ray(started: Started) -> None:
    """Three of Ray's and Serve's waits have their limit in the code; and their processes are told of as they start."""
    from ray._private import services
    from ray.serve._private import api, client

    for module in (api, client):
        vars(module)["HTTP_PROXY_TIMEOUT"] = PATIENCE_S
    services.get_node = _patient(services.get_node)
    services.start_raylet = _with_agents_ports(services.start_raylet)
    for name, function in (("GCS", "start_gcs_server"), ("raylet", "start_raylet")):
        setattr(services, function, _told(getattr(services, function), f"Ray's {name}", started))


def _patient(get_node: Callable[..., Any]) -> Callable[..., Any]:
    """Ray asks without a pause for a node that is not there yet, and gives up after 30 s."""

    def ask(*args: Any) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return get_node(*args)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    return ask


def _with_agents_ports(start_raylet: Callable[..., Any]) -> Callable[..., Any]:
    """A raylet waits for files in which its agents write their ports, and dies after a time that cannot be set: on a
    busy machine before they are up. So the ports are chosen here, and the files are there when it looks."""

    def start(*args: Any, **kwargs: Any) -> Any:
        from ray._raylet import persist_port

        call = inspect.signature(start_raylet).bind(*args, **kwargs)
        for name in AGENTS_PORTS:
            call.arguments[name] = port = call.arguments.get(name) or free_port()
            persist_port(call.arguments["session_dir"], call.arguments["node_id"], name, port)
        return start_raylet(*call.args, **call.kwargs)

    return start


def _told(start: Callable[..., Any], name: str, started: Started) -> Callable[..., Any]:
    def start_and_tell(*args: Any, **kwargs: Any) -> Any:
        info = start(*args, **kwargs)
        started(name, info.process.pid)
        return info

    return start_and_tell


def check_port(host: str, port: int) -> None:
    """Raises UserError where nobody can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def check_shared_memory(path: str = "/dev/shm") -> None:
    """Raises UserError where there is next to none: processes that use it are killed when it is full."""
    if not os.path.isdir(path):
        return
    free = shutil.disk_usage(path).free
    if free < LEAST_SHARED_BYTES:
        raise UserError(
            f"{path}: a server needs {LEAST_SHARED_BYTES >> 20} MiB of shared memory, and {free >> 20} MiB are free;"
            " remove files there, or give a container more (docker run --shm-size=1g)"
        )


def free_port() -> int:
    """A port that nobody listens on. Below the range that the kernel draws from, where Ray takes dozens meanwhile."""
    while True:
        port = secrets.randbelow(12_000) + 20_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
