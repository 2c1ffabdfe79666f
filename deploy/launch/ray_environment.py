"""The environment of a server's processes: what Ray and Serve read from it, how long they wait, and no proxies."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from elastic_moe.cluster.config import cache_directory
from elastic_moe.deploy.launch.run_directory import RunDirectory

PATIENCE_S = 600
"""How long Ray and Serve wait for a part of themselves to start. Theirs are 5 to 60 s, which a busy machine exceeds;
where a part has died, they, or the supervisor, notice that by itself."""


_PROXIES = {f"{kind}_proxy" for kind in ("http", "https", "ftp", "all", "grpc", "ws", "wss", "socks", "no")}
_PROXIES.add("ray_grpc_enable_http_proxy")


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the variables that send HTTP and gRPC through a proxy.

    A server talks to itself and to its own cluster only, and it downloads nothing. An address of this machine, which
    Ray uses for its own parts, need not be in anybody's `no_proxy`.
    """
    kept = {name: value for name, value in environment.items() if name.lower() not in _PROXIES}
    # what the system itself may prescribe, as on macOS
    return kept | {"no_proxy": "*", "NO_PROXY": "*"}


def home_settings(directory: RunDirectory) -> dict[str, str]:
    """A place for what is kept between starts, where there is no home or it cannot be written: then for this start."""
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return {"XDG_CACHE_HOME": str(directory.path / "cache")}
    return {}


def patience() -> dict[str, str]:
    """Ray's and Serve's time limits of a start. None of them is a way to notice that a process is dead."""
    seconds, milliseconds = str(PATIENCE_S), str(PATIENCE_S * 1000)
    return {
        # until a raylet, a worker, and an agent have registered, and until GCS has written its port
        "RAY_raylet_start_wait_time_s": seconds,
        "RAY_worker_register_timeout_seconds": seconds,
        "RAY_agent_register_timeout_ms": milliseconds,
        "RAY_gcs_server_port_wait_time_s": seconds,
        # until GCS answers
        "RAY_gcs_rpc_server_connect_timeout_s": seconds,
        "RAY_gcs_rpc_server_reconnect_timeout_s": seconds,
        "RAY_gcs_server_request_timeout_seconds": seconds,
        "RAY_raylet_client_num_connect_attempts": seconds,
        # GCS asks the raylet for a sign of life, this often before it calls it dead
        "RAY_health_check_failure_threshold": "30",
        # Serve kills a proxy that is not ready in time, and starts another
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": seconds,
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": seconds,
    }


def local_settings(directory: RunDirectory) -> dict[str, str]:
    """Settings of Ray and Serve for a server of its own."""
    return {
        # Everything that they write goes to the server's own directory.
        "RAY_TMPDIR": str(directory.ray),
        "TMPDIR": str(directory.temporary),
        # Ray keeps to loopback with this off, as it does on macOS and Windows: nothing listens on the network.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
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
    }
