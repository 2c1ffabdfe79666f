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
    check_groups(ServeConfig(address=address, data_parallel_size=most), cores=8, free_bytes=6_000_000_000)
    with pytest.raises(ConfigError, match=f"data_parallel_size: expected at most {most}, got {most + 1}: .* 6.0 GB"):
        check_groups(ServeConfig(address=address, data_parallel_size=most + 1), cores=8, free_bytes=6_000_000_000)


@pytest.mark.parametrize(("address", "where"), [(None, "this machine"), ("auto", "the cluster")])
def test_more_groups_than_the_cores_carry_are_refused(address: str | None, where: str) -> None:
    """Fifty were accepted on two cores, where nothing moved any more."""
    check_groups(ServeConfig(address=address, data_parallel_size=8), cores=2, free_bytes=10**12)
    with pytest.raises(ConfigError, match=f"data_parallel_size: expected at most 8, got 50: {where} has 2 cores"):
        check_groups(ServeConfig(address=address, data_parallel_size=50), cores=2, free_bytes=10**12)


def test_all_nodes_of_a_cluster_count_for_workers_and_its_head_for_engines() -> None:
    """The head's two cores allowed 8 groups, however many nodes the workers had."""

    def check(groups: int, all_cores: int) -> None:
        config = ServeConfig(address="auto", data_parallel_size=groups)
        check_groups(config, cores=2, all_cores=all_cores, free_bytes=10**12)

    check(12, 3)
    with pytest.raises(ConfigError, match="at most 12, got 13: the cluster has 3 cores, and a core carries 4 groups"):
        check(13, 3)
    check(32, 100)
    with pytest.raises(
        ConfigError, match=r"at most 32, got 33: the head .* has 2 cores, .* carries 16 groups' engines"
    ):
        check(33, 100)


def test_groups_that_run_already_need_no_free_memory() -> None:
    check_groups(ServeConfig(data_parallel_size=3), cores=8, free_bytes=500_000_000, present=2)
    check_groups(ServeConfig(data_parallel_size=2), cores=8, free_bytes=0, present=2)
    with pytest.raises(ConfigError, match=r"expected at most 3, got 4: .* beside the 2 groups that run"):
        check_groups(ServeConfig(data_parallel_size=4), cores=8, free_bytes=500_000_000, present=2)


def test_one_group_is_always_allowed() -> None:
    check_groups(ServeConfig(), cores=1, free_bytes=100)


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
