"""The environment of `ray start` on every node of a cluster that serves a model.

Serve reads its settings from the environment of the process that starts Ray, so neither `serve deploy` nor `emoe serve
--address` can set them afterwards. deploy/launch/ray_private.py names the file of Ray's that reads each.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from elastic_moe.deploy.launch.haproxy import CLIENT_TIMEOUT_S, HEALTH_PERIOD_S
from elastic_moe.deploy.launch.ray_private import HAPROXY_VARIABLE, OUR_HAPROXY

PROXY_START_S = "60"


def cluster_environment(haproxy: str) -> dict[str, str]:
    """The variables, by name. `haproxy`: the path of `emoe-haproxy` on the nodes."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # without it, HAProxy shows its statistics on ports 8404 and 9101 of every interface
        HAPROXY_VARIABLE: haproxy,
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(CLIENT_TIMEOUT_S),
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": str(HEALTH_PERIOD_S),
        # Serve kills a proxy that has not started by then; its default of 5 s is too short where nothing is cached yet
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": PROXY_START_S,
        "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": PROXY_START_S,
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Serve and the API share one event loop: a thread between them would cost a millisecond per chunk
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # by default, 1000 records of the replica's log stay in memory, and are lost when it dies
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
        # Serve writes HAProxy's configuration as the locale says, and has more than ASCII in it
        "PYTHONUTF8": "1",
        # uvicorn would trust the X-Forwarded-For of every process on this machine
        "FORWARDED_ALLOW_IPS": "",
        # Ray runs actors at niceness 15, behind everything else on the machine
        "RAY_worker_niceness": "0",
        # time between Ray's request that a process end and its kill, which a process that hangs needs
        "RAY_kill_worker_timeout_milliseconds": "200",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def haproxy_path() -> str:
    """The path of `emoe-haproxy` beside this Python, or else on the PATH; its name alone where it is not installed."""
    beside = Path(sys.executable).with_name(OUR_HAPROXY)
    return str(beside) if beside.exists() else shutil.which(OUR_HAPROXY) or OUR_HAPROXY


def exports(environment: Mapping[str, str]) -> str:
    """Lines for a shell's `eval`."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
