"""The environment of a server's processes: the settings of Ray and Serve, their time limits, and no proxies.

ray_private.py has the table of all names, and the file in which Ray or Serve reads each.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from elastic_moe.cluster.config import cache_directory
from elastic_moe.deploy.launch.run_directory import RunDirectory

PATIENCE_S = 600
"""Seconds that Ray and Serve wait for a part of themselves to start. Their defaults are 5 to 60 s, which a busy machine
exceeds. A part that has died is noticed without this limit: by Ray, by Serve, by the supervisor or, before it has
registered, by its watcher (actors/forkserver/setup_worker.py)."""

REGISTER_S = 180
"""The same for a process of Ray's to register, which it does before it does anything else: 2 to 4 s of a core. One that
ends before its watcher stands by is noticed by this limit alone, and keeps others from starting."""

_PROXIES = {f"{kind}_proxy" for kind in ("http", "https", "ftp", "all", "grpc", "ws", "wss", "socks", "no")}
_PROXIES.add("ray_grpc_enable_http_proxy")


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the variables that send HTTP and gRPC through a proxy.

    A server talks only to itself and to its own cluster, and it downloads nothing. Ray's parts talk to one another by
    an address of this machine, which the user's `no_proxy` need not contain.
    """
    kept = {name: value for name, value in environment.items() if name.lower() not in _PROXIES}
    # macOS may prescribe a proxy without any variable
    return kept | {"no_proxy": "*", "NO_PROXY": "*"}


def cluster_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` as it must be before Ray is imported to join a cluster. What the user has set stays, except
    proxies."""
    # Without it, ray.init() would turn tokens on and write a file. A cluster of another mode reports an error.
    return {"RAY_AUTH_MODE": "disabled"} | without_proxies(environment) | {"RAY_USAGE_STATS_ENABLED": "0"}


def home_settings(directory: RunDirectory) -> dict[str, str]:
    """A cache directory inside `directory`, which is removed with the server, where the usual one cannot be written."""
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return {"XDG_CACHE_HOME": str(directory.path / "cache")}
    return {}


def patience() -> dict[str, str]:
    """The time limits of Ray and Serve for a start. None of them is needed to notice that a process is dead."""
    seconds, milliseconds = str(PATIENCE_S), str(PATIENCE_S * 1000)
    return {
        # waits until a raylet, a worker and an agent have registered, and until GCS has written its port
        "RAY_raylet_start_wait_time_s": seconds,
        "RAY_worker_register_timeout_seconds": str(REGISTER_S),
        "RAY_agent_register_timeout_ms": milliseconds,
        "RAY_gcs_server_port_wait_time_s": seconds,
        # waits until GCS answers
        "RAY_gcs_rpc_server_connect_timeout_s": seconds,
        "RAY_gcs_rpc_server_reconnect_timeout_s": seconds,
        "RAY_gcs_server_request_timeout_seconds": seconds,
        "RAY_raylet_client_num_connect_attempts": seconds,
        # failed checks after which GCS takes a raylet for dead
        "RAY_health_check_failure_threshold": "30",
        # Serve kills a proxy that is not ready after this time, and starts another
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": seconds,
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": seconds,
    }


def local_settings(directory: RunDirectory) -> dict[str, str]:
    """Settings of a Ray and a Serve that run for one server on this machine."""
    return {
        # Ray and Serve write all their files into the server's own directory.
        "RAY_TMPDIR": str(directory.ray),
        "TMPDIR": str(directory.temporary),
        # With this off, Ray listens on loopback only, as it does on macOS and Windows.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # The token keeps other users of the machine out. Given here, it is written to no file.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Serve and the API share one event loop: a thread between them would cost a millisecond per chunk.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # `serve.run` makes a handle outside of any event loop; requests do not pass its router.
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
        # Otherwise a thread of that handle, which outlives Ray for a moment, would start a new Ray.
        "RAY_ENABLE_AUTO_CONNECT": "0",
        # Ray runs actors at niceness 15, behind everything else on the machine; serving is what the machine is for.
        "RAY_worker_niceness": "0",
        # Time between Ray's request that a process end and its kill. A process that hangs needs the kill; default 5 s.
        "RAY_kill_worker_timeout_milliseconds": "200",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # The default, ten times a second, takes 3 % of a core while nothing happens.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        # Nobody reads these here, and each costs something every few milliseconds: statistics of Ray's event loops,
        # Ray's metrics (the application has its own), histories of tasks, and the load of the machine.
        "RAY_event_stats": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
        "RAY_task_events_report_interval_ms": "0",
        "REPORTER_UPDATE_INTERVAL_MS": "3600000",
    }


def forking_settings() -> dict[str, str]:
    """Settings of a Ray whose workers are forked: it starts none ahead, which would be no forks and stay idle."""
    return {"RAY_prestart_worker_first_driver": "0"}
