"""Starts Ray and Serve for one server on this machine, and ends them without leaving a process.

Ray and Serve read their settings from the environment when they are imported, here and in every process that Ray
starts. So this file sets the environment first, and imports Ray inside functions.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil

from elastic_moe.actors.forkserver.stages import command_of_others, may_fork
from elastic_moe.actors.names import NAMESPACE
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.decisions.limits import check_groups
from elastic_moe.cluster.errors import ConfigError, UserError, why
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.nodes import CPU, MEMORY, all_cores
from elastic_moe.deploy.launch import ray_private
from elastic_moe.deploy.launch.console import keep_ray_lines
from elastic_moe.deploy.launch.haproxy import INSIDE, write_haproxy
from elastic_moe.deploy.launch.ray_environment import (
    PATIENCE_S,
    cluster_settings,
    forking_settings,
    home_settings,
    local_settings,
    patience,
    without_proxies,
)
from elastic_moe.deploy.launch.ray_private import Started
from elastic_moe.deploy.launch.run_directory import RunDirectory
from elastic_moe.model import native

if TYPE_CHECKING:
    from elastic_moe.actors.coordinator.coordinator import Coordinator
    from elastic_moe.actors.remote.ask import Remote

APP_NAME = "emoe"
_APPLICATION = "elastic_moe.deploy.launch.serve_app"
"""It imports what the API, the actors that compute nothing and Serve's own need."""
LEAST_SHARED_BYTES = 16 << 20
"""Free shared memory without which a server does not start."""
LEAST_THREADS, THREADS_OF_WORKER = 400, 50
"""Processes and threads that a server has while it starts, apart from its workers, and of each worker: 426 and 470 were
counted with one worker and with two."""
GPU_DEVICES = ("nvidiactl", "nvidia0", "dxg", "kfd", "nvhost-gpu", "nvgpu")
"""Files of /dev by which programs reach GPUs: NVIDIA's, those of Windows' host, AMD's, and those of NVIDIA's boards."""
DRAIN_ANSWER_S = 10.0
"""Seconds that the coordinator has to say how many requests are left."""
END_TIMEOUT_S = 5.0
"""Seconds that processes have to end by themselves."""
JOIN_TIMEOUT_S = 10.0
"""Seconds in which a Ray must answer to be joined."""


class ServerProcesses:
    """The processes that the main process starts for one server. `stop` is idempotent; the supervisor kills the
    rest."""

    def __init__(self, config: ServeConfig, directory: RunDirectory, started: Started = lambda name, pid: None) -> None:
        """`started` is called for each process of a local Ray without which the server cannot go on."""
        self._config = config
        self._directory = directory
        self._started = started
        self._connected = False
        self._coordinator: Remote[Coordinator] | None = None
        self._owns_app = False
        """Whether this server has started the application and the actors on Ray."""
        self._behind_haproxy = False
        """Whether an HAProxy of our own listens at the server's address."""

    @property
    def local(self) -> bool:
        return self._config.address is None

    def start_ray(self) -> None:
        """Start a Ray of our own, or join the one at `config.address`. Raises UserError where that does not answer."""
        self._set_environment()
        if self.local:
            # workers wait for the native library; if this machine does not have it yet, it is compiled while Ray starts
            threading.Thread(target=native.library, daemon=True).start()
        ray_private.redirect_worker_output(keep_ray_lines)
        if self.local:
            ray_private.without_onlookers()
            ray_private.lengthen_waits(PATIENCE_S)
            ray_private.choose_agents_ports(free_port)
            ray_private.watch_starts()
            ray_private.report_processes(self._started)
        self._connected = True
        common: dict[str, Any] = {"namespace": NAMESPACE, "logging_level": logging.ERROR}
        # the processes of a local Ray write to our log file themselves
        common["log_to_driver"] = not self.local
        if self.local:
            if self._forks:
                common["runtime_env"] = {"py_executable": command_of_others([_APPLICATION])}
            cpus = max(os.cpu_count() or 1, self._config.data_parallel_size * self._config.workers + 1)
            with self._without_modules():
                ray_private.connect_locally(str(self._directory.ray), cpus, common)
            return
        with self._without_modules():
            join_ray(self._config.address or "", **common)

    @property
    def _forks(self) -> bool:
        """Whether all workers of Ray are forked, those of Serve as well. Nobody has tried it beside GPUs."""
        on_cpus = self._config.device == "cpu" or (self._config.device == "auto" and not _gpu_drivers())
        return may_fork(self._config, alone=self.local) and on_cpus

    @contextlib.contextmanager
    def _without_modules(self) -> Iterator[None]:
        """Work in an empty directory: Ray puts the current one first in its workers' search path for modules.

        A file numpy.py where `emoe serve` was typed would be imported by every worker.
        """
        empty = self._directory.path / "empty"
        empty.mkdir(exist_ok=True)
        with contextlib.chdir(empty):
            yield

    def _set_environment(self) -> None:
        """Set the environment; call this before ray is imported. Variables that the user has set stay, except
        proxies."""
        inherited = without_proxies(os.environ)
        if self.local:
            ports = {f"RAY_SERVE_FALLBACK_PROXY_{kind}_PORT": str(free_port()) for kind in ("HTTP", "GRPC")}
            haproxy = write_haproxy(
                self._directory.path, self._config, metrics_port=free_port(), stats_port=free_port()
            )
            wanted = local_settings(self._directory) | patience() | ports | haproxy
            if self._forks:
                wanted |= forking_settings()
            # FORWARDED_ALLOW_IPS belongs to uvicorn; this server has a setting of that name
            own = {name: wanted[name] for name in ("RAY_TMPDIR", "TMPDIR", "FORWARDED_ALLOW_IPS")}
            inherited = wanted | inherited | own | home_settings(self._directory)
            used = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BINARY_PATH")
            self._behind_haproxy = all(name in haproxy and inherited[name] == haproxy[name] for name in used)
        else:
            inherited = cluster_settings(inherited)
        os.environ.clear()
        os.environ.update(inherited | {"RAY_USAGE_STATS_ENABLED": "0"})

    def start_app(self, model_dir: str, model: ModelInfo) -> None:
        """Start Serve and the application. Returns once the API answers, while the model loads."""
        from ray import serve

        from elastic_moe.actors.coordinator.start import start_groups
        from elastic_moe.deploy.launch.serve_app import application

        self._check_unused()
        self._check_nodes()
        self._owns_app = True
        # the weights load while Serve starts; the API then finds the coordinator
        coordinators = start_groups(self._config, model_dir, alone=self.local, model=model)
        # every API replica says to each of them what it runs, so any can be asked
        self._coordinator = coordinators[0]
        for name in ("ray.serve", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        host = INSIDE if self._behind_haproxy else self._config.host
        options = {"host": host, "port": self._config.port, "request_timeout_s": None}
        # --enable-log-requests has a line for each request, and that of Serve goes to a file that is removed unread
        logs = {"enable_access_log": False}
        serve.start(http_options=options, proxy_location="HeadOnly", logging_config=logs)
        self._check_http()
        serve.run(application(self._config, model_dir), name=APP_NAME, route_prefix="/", logging_config=logs)

    def _check_http(self) -> None:
        """Raises UserError where a joined cluster runs Serve already, and Serve listens on another port."""
        port = ray_private.serve_port()
        if port != self._config.port:
            raise UserError(
                f"--port: Ray Serve on {self._config.address} listens on port {port} already: "
                f"use --port {port}, or end it with `serve shutdown`"
            )

    def _check_unused(self) -> None:
        """Raises UserError where a joined cluster runs a server of this project already, which must not be
        disturbed."""
        from elastic_moe.actors.remote import generations

        if not generations.coordinators():
            return
        raise UserError(
            f"--address: a server runs on {self._config.address} already; end it, or what is left of it, with"
            " `serve shutdown` there"
        )

    def _check_nodes(self) -> None:
        """Raises ConfigError for more groups than a joined cluster can carry. It may have been told that its head has
        no cores; then nothing is known of it."""
        from elastic_moe.actors.remote import ray_nodes

        nodes = () if self.local else ray_nodes.nodes()
        head = next((node for node in nodes if node.head), None)
        if head is not None and (cores := int(head.total.get(CPU, 0))):
            free_bytes = int(head.free.get(MEMORY, math.inf))
            check_groups(self._config, cores=cores, all_cores=all_cores(nodes), free_bytes=free_bytes)

    def drain(self, timeout_s: float) -> None:
        """Have all replicas refuse new requests, and wait for the running ones, at most `timeout_s`.

        Does nothing before the API has started.
        """
        if self._coordinator is None:
            return
        deadline = time.monotonic() + timeout_s
        while self._running_requests() and time.monotonic() < deadline:
            time.sleep(0.1)
        # the last bytes of the last answer are still on their way
        time.sleep(0.2)

    def _running_requests(self) -> int:
        from ray.exceptions import RayError

        from elastic_moe.actors.coordinator.coordinator import Coordinator
        from elastic_moe.actors.remote.ask import ask, wait

        assert self._coordinator is not None
        try:
            return wait(ask(self._coordinator, Coordinator.stop_requests), DRAIN_ANSWER_S)
        except RayError:
            # it is being restarted, and will be asked again
            return 1

    def stop(self) -> None:
        """End in good order what was started: a local Ray, or our application and our actors on a joined cluster."""
        if not self._connected:
            return
        self._connected = False
        ours = psutil.Process().children(recursive=True) if self.local else []
        # Ray may wait for ever for a part of itself that has died; its processes are killed all the same.
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
        from elastic_moe.actors.coordinator.start import stop_cluster

        stop_cluster(END_TIMEOUT_S)
        if not self.local:
            from ray import serve

            serve.delete(APP_NAME)
            if not serve.status().applications:
                serve.shutdown()  # type: ignore[no-untyped-call]


def check_port(host: str, port: int) -> None:
    """Raises UserError where no process can listen on that address and port; ConfigError for a name without address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        raise ConfigError(f"host: expected an address or a name of this machine, got {host!r}") from None
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {why(error)} (--port takes another)") from None


def join_ray(address: str, **options: Any) -> None:
    """Join the Ray at `address`; `options` are those of ray.init. Raises UserError where that cannot be done."""
    check_answers(address)
    import ray

    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise UserError(f"--address: cannot join {address}: {' '.join(str(error).split())}") from None


def check_answers(address: str) -> None:
    """Raises UserError where nobody listens at the address (HOST:PORT) of a Ray, which would try for a minute.

    Other forms of an address (auto, ray://...) are left to Ray.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        todo = "`ray up` or `ray start --head` starts a Ray"
        raise UserError(f"--address: cannot join {address}: {why(error)} ({todo})") from None


def check_gpu(config: ServeConfig, devices: str = "/dev") -> None:
    """Raises ConfigError where --device cuda asks for GPUs, and this machine has no driver of any, or hides them all.

    Whether a GPU works is left to Ray and PyTorch.
    """
    if config.device != "cuda" or config.address is not None:
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles"):
        raise ConfigError("device: expected a GPU for cuda, but CUDA_VISIBLE_DEVICES hides them")
    if not _gpu_drivers(devices):
        raise ConfigError("device: expected a GPU for cuda, but this machine has no driver of one")


def _gpu_drivers(devices: str = "/dev") -> bool:
    return any(os.path.exists(os.path.join(devices, name)) for name in GPU_DEVICES)


def check_shared_memory(path: str = "/dev/shm") -> None:
    """Raises UserError where little shared memory is free: the kernel kills processes that use it when it is full."""
    if not os.path.isdir(path):
        return
    free = shutil.disk_usage(path).free
    if free < LEAST_SHARED_BYTES:
        raise UserError(
            f"{path}: a server needs {LEAST_SHARED_BYTES >> 20} MiB of shared memory, and {free >> 20} MiB are free;"
            " remove files there, or give a container more (docker run --shm-size=1g)"
        )


def check_threads(workers: int) -> None:
    """Raises UserError where `ulimit -u` leaves this user too few processes and threads: parts of Ray end at their
    start then, and say nothing of it. Raises the soft limit to the hard one. The limit does not count for root.

    workers: of all groups.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
    if hard == resource.RLIM_INFINITY or not os.geteuid():
        return
    needed = LEAST_THREADS + THREADS_OF_WORKER * workers
    running = sum(_threads_of(process) for process in psutil.process_iter())
    if hard < running + needed:
        raise UserError(
            f"ulimit -u: the hard limit of {hard} processes and threads is too low for this user, who has {running},"
            f" while a server of {workers} workers needs {needed}; expected at least {running + needed}"
        )


def _threads_of(process: psutil.Process) -> int:
    """Number of the process's threads if it is this user's."""
    try:
        return process.num_threads() if process.uids().real == os.getuid() else 0
    except psutil.Error:
        return 0


def free_port() -> int:
    """A port that nobody listens on. It is below the range that the kernel draws from: Ray takes dozens of ports
    there."""
    while True:
        port = secrets.randbelow(12_000) + 20_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
