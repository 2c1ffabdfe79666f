"""How many cores a worker is told to use."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.actors.coordinator.running import ready, running


@pytest.mark.parametrize(
    ("asked", "num_threads", "node_threads", "node_workers"),
    [(None, 2, 4, 4), (1, 4, 8, 2), (4, 1, 2, 8), (16, 1, 1, 32)],
)
def test_the_groups_that_there_are_share_the_cores(
    tmp_path: Path, asked: int | None, num_threads: int, node_threads: int, node_workers: int
) -> None:
    """asked: the groups that an admin call has asked for, in place of the settings' two."""

    async def story() -> None:
        async with running(tmp_path, data_parallel_size=2) as (coordinator, fleet):
            fleet.groups, fleet.threads = asked, 8
            await ready(coordinator)
            specs = [worker.target.spec for worker in fleet.workers.values()]
            assert [(s.num_threads, s.node_threads, s.node_workers) for s in specs] == [
                (num_threads, node_threads, node_workers)
            ] * 2

    asyncio.run(story())
