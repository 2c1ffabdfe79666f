"""Files and bodies of strangers: whatever is in them, the error is one of ours and says what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.placement import Placement, PlacementError
from elastic_moe.cluster.setting import read_yaml

GOOD: dict[str, Any] = {
    "num_logical_experts": 2,
    "num_layers": 1,
    "workers": [{"id": "a", "node": "n", "slots": 3}],
    "slot_to_worker": [0, 0, 0],
    "physical_to_logical_map": [[0, 1, -1]],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "slots", "x"]), inner),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 2001-13-45", "month must be in 1..12"),
        ("a: " + "[" * 5000, "recursion depth"),
        ("port: !!float abc", "could not convert string to float"),
        ("port: !!timestamp x", "groupdict"),
        ('workers: !!int ""', "index out of range"),
        ("step_timeout: 1" + "0" * 400, "step_timeout: expected a finite number, got inf"),
        ("step_timeout: .inf", "step_timeout: expected a finite number, got inf"),
        ("step_timeout: .nan", "step_timeout: expected a finite number, got nan"),
        ("? [1]\n: 2", "while constructing a mapping"),
    ],
)
def test_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        ServeConfig.from_mapping(read_yaml(path), source=str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_the_directory_of_experts_does_not_depend_on_where_a_worker_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert ServeConfig(expert_cache_dir="experts").expert_cache_dir == str(tmp_path / "experts")
    assert ServeConfig(expert_cache_dir="~/experts").expert_cache_dir == "/home/me/experts"


PIECES = (
    *("port", ": ", "- ", "\n", "  ", "[", "]", "{", "}", "!!int ", "!!binary ", "&a ", "*a", "<<"),
    *("1", "2001-", ".inf", "0x", "'", '"', "? ", "|", "%", "\t"),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.sampled_from(PIECES)))
def test_any_yaml(tmp_path: Path, text: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("".join(text))
    told = str(path)
    try:
        ServeConfig.from_mapping(read_yaml(path), source=str(path))
    except ConfigError as error:
        told = str(error)
    assert told.startswith(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # not counted up to, which took gigabytes
        ({"num_logical_experts": 10**12}, "expected 1 to 3 logical experts, .* got 1000000000000"),
        (
            {"num_logical_experts": 0, "physical_to_logical_map": [[-1, -1, -1]]},
            "expected 1 to 3 logical experts, .* got 0",
        ),
        ({"num_logical_experts": float("inf")}, "not of the expected form"),
        ({"slot_to_worker": 5}, "not of the expected form"),
        ({"slot_to_worker": [[0], 0, 0]}, "slot_to_worker must list"),
        ({"workers": [{"id": "a", "node": "n", "slots": float("inf")}]}, "not of the expected form"),
        ({"workers": [{"id": "a", "node": "n", "slots": 10**30}]}, "the map is"),
        ({"physical_to_logical_map": [[0, 1, 10**30]]}, "physical_to_logical_map must be"),
        ({"tiers": [["device", "tape", "disk"]]}, "tiers: expected one of device, host, disk, got 'tape'"),
        ({"tiers": [["device", "disk"]]}, "tiers must have a word for each slot"),
        ({"tiers": "disk"}, "tiers must be a list of lists"),
    ],
)
def test_placement(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement.from_dict(GOOD | changes)


@given(key=st.sampled_from(sorted(GOOD)), value=JSON)
def test_any_placement(key: str, value: Any) -> None:
    try:
        placement = Placement.from_dict(GOOD | {key: value})
    except PlacementError:
        return
    assert Placement.from_dict(json.loads(json.dumps(placement.to_dict()))) == placement


def test_a_placement_file_that_is_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("[" * 200_000)
    with pytest.raises(PlacementError, match=f"{path}: not JSON"):
        Placement.load(path)
