"""How many groups a machine holds."""

from __future__ import annotations

import pytest

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.decisions.limits import check_groups
from elastic_moe.cluster.errors import ConfigError


@pytest.mark.parametrize(("address", "most"), [(None, 12), ("auto", 20)])
def test_more_groups_than_the_memory_holds_are_refused(address: str | None, most: int) -> None:
    """On one machine the two workers of each group count too."""
    check_groups(ServeConfig(address=address, data_parallel_size=most), 6_000_000_000)
    with pytest.raises(ConfigError, match=f"data_parallel_size: expected at most {most}, got {most + 1}: .* 6 GB"):
        check_groups(ServeConfig(address=address, data_parallel_size=most + 1), 6_000_000_000)


def test_one_group_is_always_allowed() -> None:
    check_groups(ServeConfig(), 100)
