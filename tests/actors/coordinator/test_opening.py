"""What the configuration leaves open, and the checkpoint settles."""

from typing import Any

import pytest

from elastic_moe.actors.coordinator.opening import control_settings, model_spec
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from tests.actors.fakes import MODEL


@pytest.mark.parametrize(
    ("settings", "dtype", "max_model_len"),
    [({}, "float32", 64), ({"dtype": "bfloat16", "max_model_len": 32}, "bfloat16", 32)],
)
def test_settings_not_given_are_the_checkpoints(settings: dict[str, Any], dtype: str, max_model_len: int) -> None:
    spec = model_spec(ServeConfig(**settings), MODEL, "/models/tiny", "cpu")
    assert (spec.path, spec.dtype, spec.device, spec.max_model_len) == ("/models/tiny", dtype, "cpu", max_model_len)


def test_a_longer_context_than_the_model_s_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len: the model allows 64, got 65"):
        model_spec(ServeConfig(max_model_len=65), MODEL, "/models/tiny", "cpu")


def test_memory_beside_gpus_is_refused_where_there_are_none() -> None:
    config = ServeConfig(host_expert_memory_bytes=1 << 30)
    with pytest.raises(ConfigError, match=r"host_expert_memory_bytes: expected 0, .* got 1073741824"):
        model_spec(config, MODEL, "/models/tiny", "cpu")
    assert model_spec(config, MODEL, "/models/tiny", "cuda").device == "cuda"
    assert model_spec(ServeConfig(host_expert_memory_bytes=0), MODEL, "/models/tiny", "cpu").device == "cpu"


@pytest.mark.parametrize(("memory_bytes", "capacity"), [(None, None), (2500, 2)])
def test_memory_is_counted_in_whole_experts(memory_bytes: int | None, capacity: int | None) -> None:
    config = ServeConfig(expert_memory_bytes=memory_bytes, max_num_seqs=3)
    settings = control_settings(config, MODEL, shared_gpus=False)
    assert (settings.expert_capacity, settings.seats_per_worker) == (capacity, 3)
