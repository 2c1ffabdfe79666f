"""What a server's processes find in their environment."""

from __future__ import annotations

import inspect
import os
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from elastic_moe.cluster.config import ServeConfig, cache_directory
from elastic_moe.deploy.launch import local_ray
from elastic_moe.deploy.launch.local_ray import ServerProcesses
from elastic_moe.deploy.launch.ray_environment import home_settings, local_settings, patience, without_proxies
from elastic_moe.deploy.launch.run_directory import RunDirectory

PROXY = "http://proxy.example:3128"


def test_no_variable_of_a_proxy_is_left() -> None:
    names = ("http_proxy", "HTTPS_PROXY", "grpc_proxy", "all_proxy", "ftp_proxy", "http_PROXY")
    kept = without_proxies(dict.fromkeys(names, PROXY) | {"no_proxy": "localhost", "PATH": "/bin"})
    assert kept == {"PATH": "/bin", "no_proxy": "*", "NO_PROXY": "*"}


def test_all_addresses_are_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in without_proxies({"http_proxy": PROXY}).items():
        monkeypatch.setenv(name, value)
    assert urllib.request.proxy_bypass("192.0.2.2:8000")


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(path=tmp_path, lock=-1)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test changes in the environment is undone, since the code under test replaces all of it."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.usefixtures("environment")
def test_a_local_server_keeps_everything_in_its_directory(directory: RunDirectory) -> None:
    os.environ |= {"TMPDIR": "/somewhere", "http_proxy": PROXY, "RAY_SERVE_LOG_TO_STDERR": "3"}
    ServerProcesses(ServeConfig(), directory)._set_environment()
    assert os.environ["TMPDIR"] == str(directory.temporary)
    assert os.environ["RAY_TMPDIR"] == str(directory.ray)
    assert "http_proxy" not in os.environ
    # what the user has set stays
    assert os.environ["RAY_SERVE_LOG_TO_STDERR"] == "3"
    assert os.environ.items() >= patience().items()


@pytest.mark.usefixtures("environment")
def test_a_joined_cluster_has_its_own_settings(directory: RunDirectory) -> None:
    os.environ |= {"TMPDIR": "/somewhere", "http_proxy": PROXY}
    ServerProcesses(ServeConfig(address="192.0.2.1:6379"), directory)._set_environment()
    assert os.environ["TMPDIR"] == "/somewhere"
    assert "http_proxy" not in os.environ
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_ray_knows_every_setting(directory: RunDirectory) -> None:
    """It ignores a name that it does not know, silently."""
    root = Path(find_spec("ray").origin).parent  # type: ignore[union-attr,arg-type]
    binaries = ("core/src/ray/raylet/raylet", "core/src/ray/gcs/gcs_server", "_raylet.so")
    sources = [
        *(root / "_private").glob("*.py"),
        *(root / "_common").glob("*.py"),
        root / "serve/_private/constants.py",
    ]
    sources += [root / "dashboard/modules/reporter/reporter_consts.py"]
    known = b"\0".join(path.read_bytes() for path in [*(root / name for name in binaries), *sources])
    wanted = {name for name in patience() | local_settings(directory) if name != "TMPDIR"}
    assert {name for name in wanted if name.removeprefix("RAY_").encode() not in known} == set()


def test_a_home_that_cannot_be_written_is_replaced(
    directory: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_settings(directory) == {}
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    settings = home_settings(directory)
    monkeypatch.setenv("XDG_CACHE_HOME", settings["XDG_CACHE_HOME"])
    assert cache_directory().is_relative_to(directory.path)


def test_a_node_that_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ray.time, "sleep", lambda _: None)
    answers = iter([RuntimeError("not yet"), RuntimeError("not yet"), {"node": 1}])

    def get_node(*_: object) -> object:
        answer = next(answers)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    assert local_ray._patient(get_node)("address", "node") == {"node": 1}


def test_a_raylet_need_not_wait_for_its_agents_ports(tmp_path: Path) -> None:
    """It gives up after a time that cannot be set, which a busy machine exceeds."""
    from ray import _raylet
    from ray._private import services

    told: dict[str, int] = {}

    def start_raylet(
        node_id: str,
        session_dir: str,
        metrics_agent_port: int | None = None,
        metrics_export_port: int | None = None,
        dashboard_agent_listen_port: int | None = None,
        runtime_env_agent_port: int | None = None,
    ) -> str:
        told.update(
            metrics_agent_port=metrics_agent_port or 0,
            metrics_export_port=metrics_export_port or 0,
            dashboard_agent_listen_port=dashboard_agent_listen_port or 0,
            runtime_env_agent_port=runtime_env_agent_port or 0,
        )
        return "started"

    node = "ab" * 28
    assert local_ray._with_agents_ports(start_raylet)(node, str(tmp_path), metrics_agent_port=0) == "started"
    assert len(set(told.values())) == 4
    for name in local_ray.AGENTS_PORTS:
        assert _raylet.wait_for_persisted_port(str(tmp_path), node, name, 1, 1) == told[name] > 0
    # Ray's own function takes them by these names
    names = {"node_id", "session_dir", *local_ray.AGENTS_PORTS}
    assert names <= set(inspect.signature(services.start_raylet).parameters)
    assert set(local_ray.AGENTS_PORTS) == {
        _raylet.METRICS_AGENT_PORT_NAME,
        _raylet.METRICS_EXPORT_PORT_NAME,
        _raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME,
        _raylet.RUNTIME_ENV_AGENT_PORT_NAME,
    }
