"""Files and bodies of strangers: whatever is in them, the error is one of ours and says what was expected."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.placement import Placement, PlacementError
from elastic_moe.cluster.setting import base_type, range_text, read_yaml, with_unit

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
        ("port: 2001-13-45", "line 1, column 7: the value '2001-13-45' cannot be read"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("port: !!float abc", "line 1, column 7: the value 'abc' cannot be read"),
        ("port: !!timestamp x", "line 1, column 7: the value 'x' cannot be read"),
        ('workers: !!int ""', "line 1, column 10: the value '' cannot be read"),
        ("step_timeout: 1" + "0" * 400, "step_timeout: expected a finite number, got inf"),
        ("step_timeout: .inf", "step_timeout: expected a finite number, got inf"),
        ("step_timeout: .nan", "step_timeout: expected a finite number, got nan"),
        ("workers: 2\nworkers: 3", "key 'workers' is there 2 times"),
        ("? [1]\n: 2", "line 1, column 3: a key must be a text"),
        ('workers: "2"', "workers: expected a whole number, got '2'; write it without quotes"),
        ("workers: 2.0", "workers: expected a whole number, got 2.0; write 2"),
        ("workers: true", "workers: expected a whole number, got true$"),
        ("workers:", "workers: expected a whole number, got nothing; leave the key out"),
        ("standby: 1", "standby: expected true or false, got 1$"),
        ('standby: "no"', "standby: expected true or false, got 'no'; write it without quotes"),
        ("step_timeout: 1m", "step_timeout: expected a number, got '1m'$"),
        ("dtype: 3", "dtype: expected a text, got 3; write it in quotes"),
        ("dtype: 2026-01-02", "dtype: expected a text, got 2026-01-02; write it in quotes"),
        ("no-fork-workers: true", "--no-fork-workers is a flag; the key is fork_workers: false"),
        ("no_standby: false", "--no-standby is a flag; the key is standby: true"),
        ("no_workers: true", "unknown key 'no_workers'"),
        ("- a", "expected settings, in each line `key: value`, got a list"),
        ("port 8000", "expected settings, in each line `key: value`, got the text 'port 8000'"),
        ("workers: 2\n port: 3", "line 2, column 6: a colon does not fit here: indent all keys alike"),
        ("  a: 1\nb: 2", "line 2, column 1: this does not fit the lines before"),
        ("workers: 2\n\tport: 3", "line 2, column 1: a tab cannot stand here"),
        ("a: [1,2", "line 1, column 4: a comma or ] is missing of this list"),
        ("\na: 'x", "line 2, column 4: the closing quote of this text is missing"),
        ("a: @x", "line 1, column 4: a text that begins with this character must be in quotes"),
        ("a: *x", r"line 1, column 4: a text that begins with \* must be in quotes"),
        ("a: !x y", "line 1, column 4: a text that begins with ! must be in quotes"),
        ("a: \0", "character 4 is 0, which no YAML file may have"),
        (
            "args:\n  max-model-len: 32k",
            "unknown key 'args': settings are not nested here; .* such as 'max-model-len', at",
        ),
        (
            "http_options: {}\napplications:\n- name: emoe\n  args: {workers: 2}",
            "this is a file for `serve deploy`: `emoe serve` takes",
        ),
        ("a: &a [*a]", "unknown key 'a'"),
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


@pytest.mark.parametrize("field", dataclasses.fields(ServeConfig), ids=lambda field: field.name)
def test_each_number_has_bounds(field: dataclasses.Field[Any]) -> None:
    """A timeout of 1e30 seconds was taken, and what waited for it never ended."""
    kind = base_type(typing.get_type_hints(ServeConfig)[field.name])
    if kind not in (int, float):
        assert field.metadata["within"] is None
        return
    least, most = field.metadata["within"]
    assert field.default is None or least <= field.default <= most
    for value in (most + 1, least - 1, -1, 10**30, -(10**30)):
        with pytest.raises(ConfigError, match=f"^{field.name}: expected {range_text((least, most))}, got "):
            ServeConfig(**{field.name: kind(value)})


@pytest.mark.parametrize("name", [n for n, hint in typing.get_type_hints(ServeConfig).items() if hint == str | None])
def test_an_empty_text_is_no_setting(name: str) -> None:
    """Of a variable that is not set. As a path it was the working directory."""
    with pytest.raises(ConfigError, match=f"^{name}: expected some text, got an empty one"):
        ServeConfig(**{name: " "})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("4096", 4096), ("1k", 1000), ("1K", 1024), ("25.6k", 25_600), ("1G", 2**30), ("2t", 2 * 10**12)),
        *(("1kB", 1000), ("1KB", 1000), ("1 kb", 1000), ("1KiB", 1024), ("1.5MiB", 3 << 19), ("8Gi", 8 << 30)),
        # a float has no more than 53 bits
        *(("9007199254740993", 2**53 + 1), ("900719925474.0993kB", 900719925474099), ("1125899906842623B", 2**50 - 1)),
    ],
)
def test_sizes(text: str, number: int) -> None:
    assert number > 2**50 or ServeConfig(expert_memory_bytes=text).expert_memory_bytes == number
    assert with_unit(text, of_bytes=True) == number


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "1.5K", "1e9", "-1", "0x10", "1 000", "1Q", "8GBs", "\u0663", "1" * 40]
)
def test_texts_that_are_no_size(text: str) -> None:
    assert with_unit(text, of_bytes=True) is None
    with pytest.raises(ConfigError, match=r"^expert_memory_bytes: expected bytes, or a size such as 8GB"):
        ServeConfig(expert_memory_bytes=text)


def test_tokens_take_multiples_and_no_bytes() -> None:
    assert ServeConfig(max_model_len="32k", max_num_batched_tokens="8K").max_model_len == 32_000
    for text in ("32kB", "1.5K"):
        with pytest.raises(ConfigError, match=r"^max_model_len: expected a whole number, or one such as 32k"):
            ServeConfig(max_model_len=text)
    with pytest.raises(ConfigError, match=r"^workers: expected a whole number, got '2'; write it without quotes"):
        ServeConfig(workers="2")


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
        ({"num_logical_experts": 10**12}, "num_logical_experts: expected 1 to 3, .* got 1000000000000"),
        (
            {"num_logical_experts": 0, "physical_to_logical_map": [[-1, -1, -1]]},
            "num_logical_experts: expected 1 to 3, .* got 0",
        ),
        ({"num_logical_experts": float("inf")}, "num_logical_experts: expected a whole number, got inf"),
        ({"num_logical_experts": True}, "num_logical_experts: expected a whole number, got true"),
        ({"slot_to_worker": 5}, "slot_to_worker: expected a list, got 5"),
        ({"workers": {"a": 1}}, r"workers: expected a list, got \{'a': 1\}"),
        ({"workers": ["a"]}, "workers.0: expected an object, got 'a'"),
        ({"workers": [{"id": "a", "node": "n"}]}, "workers.0.slots: the key is missing"),
        ({"workers": [{"id": ["a"], "node": "n", "slots": 3}]}, r"workers.0.id: expected a text, got \['a'\]"),
        (
            {"physical_to_logical_map": [[0, 1], [2]]},
            "physical_to_logical_map: expected equally long lists",
        ),
        ({"slot_to_worker": [[0], 0, 0]}, "slot_to_worker: expected each worker's slots"),
        (
            {"workers": [{"id": "a", "node": "n", "slots": float("inf")}]},
            "workers.0.slots: expected a whole number, got inf",
        ),
        ({"workers": [{"id": "a", "node": "n", "slots": 10**30}]}, "physical_to_logical_map: expected"),
        ({"physical_to_logical_map": [[0, 1, 10**30]]}, "physical_to_logical_map: expected"),
        ({"tiers": [["device", "tape", "disk"]]}, "tiers: expected one of device, host, disk, got 'tape'"),
        ({"tiers": [["device", "disk"]]}, "tiers: expected a word for each slot"),
        ({"tiers": "disk"}, "tiers: expected a list of lists"),
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
