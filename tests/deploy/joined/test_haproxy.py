"""`emoe-haproxy`: what Serve's HAProxy becomes on a cluster that others have started."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.deploy.joined.environment import cluster_environment, haproxy_path
from elastic_moe.deploy.joined.haproxy import corrections_of
from elastic_moe.deploy.launch.haproxy_config import corrected
from tests.deploy.proxied import serves_configuration


@pytest.mark.parametrize(("host", "bound"), [("0.0.0.0", "*"), ("127.0.0.1", "127.0.0.1"), ("192.0.2.1", "192.0.2.1")])
def test_only_the_api_listens_where_serve_was_told_to(tmp_path: Path, host: str, bound: str) -> None:
    """Left alone, Serve opens the statistics on every interface: ports 8404 and 9101."""
    text = serves_configuration(tmp_path, port=8000, host=host, backend_port=1)
    assert len(re.findall(r"^ *bind \*?:\d+$", text, re.MULTILINE)) >= 2
    changed = corrected(text, corrections_of([str(tmp_path / "haproxy.cfg")], {}))
    addresses = re.findall(r"^ *bind (.*):(\d+)", changed, re.MULTILINE)
    assert [address for address, port in addresses if port == "8000"] == [bound]
    assert {address for address, port in addresses if port != "8000"} == {"127.0.0.1"}


def test_serve_can_run_it(tmp_path: Path) -> None:
    """HAProxy checks the configuration that it has corrected, error pages included. In Serve's environment, HAProxy is
    the command itself."""
    serves_configuration(tmp_path, port=8000, host="0.0.0.0", backend_port=1)
    config = tmp_path / "haproxy.cfg"
    command = [haproxy_path(), "-c", "-f", str(config)]
    environment = os.environ | cluster_environment(haproxy_path())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert config.read_text().startswith("# corrected\n")
    assert (tmp_path / "503.http").exists()


def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    environ = {"EMOE_FORWARDED_ALLOW_IPS": "192.0.2.0/24", "EMOE_MAX_CONNECTIONS_PER_ADDRESS": "7"}
    wanted = corrections_of([str(tmp_path / "haproxy.cfg")], environ)
    assert wanted.max_connections_per_address == 7
    assert "192.0.2.0/24" in wanted.unbounded
    assert wanted.run_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"EMOE_MAX_CONNECTIONS_PER_ADDRESS": "many"}, "EMOE_MAX_CONNECTIONS_PER_ADDRESS: expected a number"),
        ({"EMOE_MAX_CONNECTIONS_PER_ADDRESS": "0"}, "max_connections_per_address: expected 1 to 1000000, got 0"),
        ({"EMOE_FORWARDED_ALLOW_IPS": "proxy"}, "forwarded_allow_ips: expected addresses"),
    ],
)
def test_a_wrong_setting_is_named(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        corrections_of([], environ)
