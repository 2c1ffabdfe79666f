"""What a configuration may ask of a machine and of a model."""

from __future__ import annotations

import dataclasses

import pytest

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.decisions.limits import check_groups, check_limits
from elastic_moe.cluster.errors import ConfigError
from tests.cluster.simulation import MODEL


@pytest.mark.parametrize(("address", "most"), [(None, 12), ("auto", 20)])
def test_more_groups_than_the_memory_holds_are_refused(address: str | None, most: int) -> None:
    """On one machine the two workers of each group count too."""
    check_groups(ServeConfig(address=address, data_parallel_size=most), 6_000_000_000)
    with pytest.raises(ConfigError, match=f"data_parallel_size: expected at most {most}, got {most + 1}: .* 6 GB"):
        check_groups(ServeConfig(address=address, data_parallel_size=most + 1), 6_000_000_000)


def test_one_group_is_always_allowed() -> None:
    check_groups(ServeConfig(), 100)


def test_a_cache_without_room_for_one_request_is_refused() -> None:
    """It was refused by a worker, half a minute after the start of Ray."""
    windowed = dataclasses.replace(MODEL, dtype="bfloat16", max_model_len=1000, kv_layers=((128, None), (64, 100)))
    least = 2 * (128 * 1000 + 64 * 100)
    check_limits(ServeConfig(kv_cache_memory_bytes=least), windowed)
    with pytest.raises(
        ConfigError, match=rf"kv_cache_memory_bytes: expected at least {least}, .* max_model_len \(1000"
    ):
        check_limits(ServeConfig(kv_cache_memory_bytes=least - 1), windowed)
    check_limits(ServeConfig(kv_cache_memory_bytes=2 * 50 * 192, max_model_len=50), windowed)
