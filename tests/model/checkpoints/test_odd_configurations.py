"""Configurations with wrong numbers and wrong types give one clear error line, quickly, for every family."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.limits import BuildingTakesTooLong, WithinCpuTime
from tests.model.families import tiny_checkpoint

MOST_CPU_S = 5.0
"""Of this thread. The test machine does it in a fraction of a second; without a bound it would be minutes."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A private copy of a tiny checkpoint."""
    return lambda name: Path(shutil.copytree(tiny_checkpoint(name, tmp_path_factory), tmp_path / name))


def edit(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refusal(path: Path) -> str:
    begin = time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert time.thread_time() - begin < MOST_CPU_S
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 0}, "its router gives a token no expert: num_experts_per_tok"),
        ("deepseek_v3", {"num_experts_per_tok": 0}, "its router gives a token no expert: num_experts_per_tok"),
        ("qwen3_moe", {"num_hidden_layers": -1}, "num_hidden_layers: expected at least 1 layer, found -1"),
        ("qwen3_moe", {"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1 layer, found 0"),
        ("qwen3_moe", {"num_hidden_layers": 10**9}, "expected at most 22 layers; the files have 3; found 1000000000"),
        ("deepseek_v3", {"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers: expected at most"),
        ("qwen3_moe", {"num_local_experts": 10**9}, "expected 1000000000"),
        ("deepseek_v3", {"n_routed_experts": 10**9}, "expected 1000000000"),
        ("gpt_oss", {"num_local_experts": 10**9}, "config.json asks for"),
        ("qwen3_moe", {"num_labels": 10**9}, "num_labels: expected a number from 0 to 100000"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "it has no MoE layer"),
        ("deepseek_v3", {"first_k_dense_replace": 3}, "it has no MoE layer"),
        ("qwen3_moe", {"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        (
            "qwen3_moe",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e300}},
            "with the scaling of its rotary embeddings: expected from 2",
        ),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": math.nan}}, "config.json"),
        ("phimoe-longrope", {"rope_parameters": {"rope_type": "longrope"}}, "config.json"),
    ],
)
def test_a_wrong_number_is_one_line(
    copy: Callable[[str], Path], family: str, fields: dict[str, Any], expected: str
) -> None:
    path = copy(family)
    edit(path, **fields)
    assert expected in refusal(path)


def test_layers_beyond_all_models_are_refused_without_files_too(copy: Callable[[str], Path]) -> None:
    path = copy("qwen3_moe")
    (path / "model.safetensors").unlink()
    edit(path, num_hidden_layers=10**9)
    assert "num_hidden_layers: expected at most 1000 layers; found" in refusal(path)


def test_building_ends_when_it_has_computed_too_long() -> None:
    now = iter(range(100))
    with pytest.raises(BuildingTakesTooLong), torch.device("meta"), WithinCpuTime(20, clock=lambda: next(now)):
        nn.ModuleList([nn.Linear(2, 2) for _ in range(1000)])


numbers = st.sampled_from(
    [-(10**9), -1, 0, 1, 2, 3, 7, 10**9, 2**31, 2**63, 10**30, -0.5, 0.5, 1e300, math.inf, math.nan]
)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.sampled_from(["", "x", "default", "full_attention", "float32"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "type", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe-longrope"])
def test_any_value_of_any_field_is_taken_or_refused(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = Path(shutil.copytree(tiny_checkpoint(family, tmp_path_factory), tmp_path_factory.mktemp("odd") / "copy"))
    file = path / "config.json"
    original = json.loads(file.read_text())
    more = ["num_labels", "rope_scaling", "quantization_config", "text_config", "layer_types", "torch_dtype"]
    fields = st.sampled_from([*original, *more])

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changes=st.dictionaries(fields, values, min_size=1, max_size=2))
    def check(changes: dict[str, Any]) -> None:
        file.write_text(json.dumps(original | changes))
        begin = time.thread_time()
        refused = ""
        try:
            info = open_checkpoint(path).info
            assert min(info.num_layers, info.num_logical_experts, info.top_k, info.max_model_len - 1) > 0
        except CheckpointError as error:
            refused = str(error)
        assert "\n" not in refused
        assert time.thread_time() - begin < MOST_CPU_S

    check()
