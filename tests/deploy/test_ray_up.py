"""The files of `ray up`: Ray takes them to the key, their commands are commands, and what they copy is there."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_moe.cluster.config import ServeConfig
from tests.paths import ROOT
from tests.rooms import FOLDERS

FILES = ("ray-cluster.yaml", "ray-cluster-gcp.yaml", "ray-cluster-local.yaml")
CLOUDS = FILES[:2]


def read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / name).read_text())
    return data


def commands(config: dict[str, Any]) -> list[str]:
    """Every command of the file, in no order."""
    return [command for key, value in config.items() if key.endswith("_commands") for command in value]


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read(name))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    with pytest.raises(Exception, match="misspelled"):
        validate_config(prepare_config(read(name) | {"misspelled": 1}))


@pytest.mark.parametrize("name", CLOUDS)
def test_the_autoscaler_prefers_spot_machines_and_keeps_one_that_stays(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    types = AutoscalingConfig(prepare_config(read(name)), skip_content_hash=True).get_node_type_configs()
    spot, staying = types["gpu_spot"], types["gpu_on_demand"]
    assert spot.priority > staying.priority
    assert (spot.min_worker_nodes, staying.min_worker_nodes) == (0, 1)
    assert spot.resources == staying.resources
    assert not types["head"].resources.get("CPU")


@pytest.mark.parametrize("name", FILES)
def test_its_commands_are_commands(name: str) -> None:
    for command in commands(read(name)):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize("name", FILES)
def test_ray_asks_for_its_token_on_every_node(name: str) -> None:
    config = read(name)
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    starts = [command for command in commands(config) if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in (command if name not in CLOUDS else " ".join(config["docker"]["run_options"]))
        assert "--dashboard-host=127.0.0.1" in command or "--head" not in command


@pytest.mark.parametrize("name", FILES)
def test_what_it_copies_is_there(name: str) -> None:
    for local in read(name)["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), local


def test_machines_of_ones_own_get_what_an_installation_needs() -> None:
    mounts = read("ray-cluster-local.yaml")["file_mounts"]
    assert {*FOLDERS, "pyproject.toml", "setup.py", "README.md", "LICENSE", "Makefile"} == {
        local for local in mounts.values() if not local.startswith("~")
    }
    assert all(remote == f"~/elastic-moe/{local}" for remote, local in mounts.items() if not local.startswith("~"))


def test_every_limit_of_the_machines_is_set() -> None:
    for name in FILES:
        config = read(name)
        assert config["idle_timeout_minutes"] > 0
        assert config["max_workers"] >= 1
        assert all("ulimit -n" in command for command in commands(config) if "ray start" in command)


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # of Ray's own schema module
@pytest.mark.parametrize("name", ["serve.yaml", "serve-gpu.yaml"])
def test_serve_takes_the_application(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    data = read(name)
    ServeDeploySchema.model_validate(copy.deepcopy(data))
    # Ray accepts misspelled keys
    assert set(data) <= set(ServeDeploySchema.model_fields)
    (application,) = data["applications"]
    assert application["import_path"] == "elastic_moe.deploy.launch.serve_app:build_app"
    assert ServeConfig.from_mapping(application["args"]).host == data["http_options"]["host"]


def test_the_model_lies_where_the_server_looks_for_it() -> None:
    (application,) = read("serve-gpu.yaml")["applications"]
    model = application["args"]["model"]
    for name in CLOUDS:
        assert any(f"--local-dir {model}" in command for command in read(name)["setup_commands"])
        assert any(option.endswith(f":{Path(model).parent}") for option in read(name)["docker"]["run_options"])
