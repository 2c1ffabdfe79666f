"""What a server's processes find in their environment."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

import pytest

from elastic_moe.cluster.config import ServeConfig, cache_directory
from elastic_moe.deploy.launch.local_ray import ServerProcesses
from elastic_moe.deploy.launch.ray_environment import home_settings, patience, without_proxies
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
