"""Ray and Serve for one server on this machine: their environment, their start, and an end that leaves no process.

Ray Serve reads its settings from the environment when it is imported, here and in every process that Ray starts. So
the environment is set first, and ray is imported inside functions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from actors.names import NAMESPACE
from cluster.config import ServeConfig
from cluster.errors import UserError
from cluster.protocol import ModelInfo
from deploy.cli_console import keep_ray_lines
from deploy.haproxy import write_haproxy
from model import native

APP_NAME = "emoe"
CONNECT_TIMEOUT_S = 20
END_TIMEOUT_S = 5.0
"""How long processes get to end by themselves before they are killed."""


class ServerProcesses:
    """What was started for one server. `stop` is idempotent."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._run_dir: Path | None = None
        self._connected = False
        self._owns_app = False
        """Whether the application and the actors on Ray are this server's."""
        self.hangs = False
        """Whether a thread of Ray did not end: then only `os._exit` leaves this process."""

    @property
    def local(self) -> bool:
        return self._config.address is None

    def start_ray(self) -> None:
        """Start a Ray of our own, or join the one at `config.address`. Raises UserError where it does not answer."""
        if self.local:
            # short, because a socket's path must fit into 107 bytes
            self._run_dir = Path(tempfile.mkdtemp(prefix="emoe-", dir="/tmp"))
            os.environ.update(_local_environment(self._run_dir, self._config))
        else:
            # A cluster with another mode says so; plain ray.init() would turn tokens on and write a file.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        if self.local:
            # compiled while Ray starts, should this machine not have it yet: workers wait for it
            threading.Thread(target=native.library, daemon=True).start()
        import ray

        _silence_ray()
        if self.local:
            _without_onlookers()
        self._connected = True
        common: dict[str, Any] = {"namespace": NAMESPACE, "logging_level": logging.ERROR}
        # a Ray of our own needs no help: its processes share a log file with this one
        common["log_to_driver"] = not self.local
        if self.local:
            cpus = max(os.cpu_count() or 1, self._config.workers + 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **common)
            return
        try:
            ray.init(address=self._config.address, **common)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise UserError(f"--address: cannot join {self._config.address}: {' '.join(str(error).split())}") from None

    def start_app(self, model_dir: str, model: ModelInfo) -> None:
        """Start Serve and the application. Returns once the API answers, while the model loads."""
        from ray import serve

        from actors.cluster import start_cluster
        from actors.fleet import RayFleet
        from deploy.serve_app import application

        self._check_unused()
        self._owns_app = True
        # the weights load while Serve starts; the API then finds the coordinator
        start_cluster(self._config, model_dir, RayFleet(self._config, model=model))
        for name in ("ray.serve", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        options = {"host": self._config.host, "port": self._config.port, "request_timeout_s": None}
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

        from actors.names import COORDINATOR

        try:
            ray.get_actor(COORDINATOR, namespace=NAMESPACE)
        except ValueError:
            return
        raise UserError(
            f"--address: a server runs on {self._config.address} already; end it, or what is left of it, with"
            " `serve shutdown` there"
        )

    def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for those under way."""
        from ray import serve

        handle: Any = serve.get_app_handle(APP_NAME)
        deadline = time.monotonic() + timeout_s
        while handle.drain.remote().result(timeout_s=10) and time.monotonic() < deadline:
            time.sleep(0.1)
        # the last bytes of the last answer
        time.sleep(0.2)

    def stop(self) -> None:
        """End everything that was started. On a cluster that was joined: our application and our actors."""
        if not self._connected:
            return
        self._connected = False
        ours = psutil.Process().children(recursive=True) if self.local else []
        # Ray may wait for ever for a part of itself that is gone; then its processes are killed all the same.
        ending = threading.Thread(target=self._disconnect, daemon=True)
        ending.start()
        ending.join(3 * END_TIMEOUT_S)
        if self.local:
            ours = list({*ours, *psutil.Process().children(recursive=True)})
        _end(ours, END_TIMEOUT_S)
        self.hangs = ending.is_alive()
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)

    def kill(self) -> None:
        """End everything at once."""
        if self.local:
            _end(psutil.Process().children(recursive=True), 0)
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)

    def _disconnect(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            if ray.is_initialized() and self._owns_app:
                self._stop_actors()
        with contextlib.suppress(Exception):
            ray.shutdown()

    def _stop_actors(self) -> None:
        from actors.cluster import stop_cluster

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


def check_port(host: str, port: int) -> None:
    """Raises UserError where nobody can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def _local_environment(run_dir: Path, config: ServeConfig) -> Mapping[str, str]:
    """Settings of Ray and Serve for a server of its own. What the user has set stays."""
    wanted = {
        # The token keeps other users of the machine out; given here, no file is written.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # One event loop for Serve and the API: threads between them cost a millisecond per chunk.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # `drain` uses a handle outside of any event loop. Requests pass no router.
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
        # A thread of that handle, still alive while Ray is shut down, would else start a new Ray.
        "RAY_ENABLE_AUTO_CONNECT": "0",
        # Ray runs actors at niceness 15, behind everything else on the machine; this is what the machine is for.
        "RAY_worker_niceness": "0",
        # A process that hangs cannot obey an order to end: Ray waits so long before it kills it, by default 5 s.
        "RAY_kill_worker_timeout_milliseconds": "200",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Ten times a second, as by default, takes 3 % of a core when nothing happens.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        # What nobody reads here, and costs something every few milliseconds: statistics of Ray's own event loops,
        # metrics (the application has its own), histories of tasks, and what the machine is doing.
        "RAY_event_stats": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
        "RAY_task_events_report_interval_ms": "0",
        "REPORTER_UPDATE_INTERVAL_MS": "3600000",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
    }
    binary = write_haproxy(run_dir, config, metrics_port=free_port(), stats_port=free_port())
    return {name: os.environ.get(name, value) for name, value in (wanted | binary).items()}


def free_port() -> int:
    """A port that nobody listens on. Below the range that the kernel draws from, where Ray takes dozens meanwhile."""
    while True:
        port = secrets.randbelow(12_000) + 20_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _end(processes: list[psutil.Process], timeout_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s) if timeout_s else ([], processes)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=2)
