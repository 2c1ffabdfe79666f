"""How many cores a worker is told to use."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.cluster.config import ServeConfig
from tests.actors.fakes import PlainFleet


@pytest.mark.parametrize(
    ("asked", "num_threads", "node_threads", "node_workers"),
    [(None, 2, 4, 4), (1, 4, 8, 2), (4, 1, 2, 8), (16, 1, 1, 32)],
)
def test_the_groups_that_there_are_share_the_cores(
    tmp_path: Path, asked: int | None, num_threads: int, node_threads: int, node_workers: int
) -> None:
    """asked: the groups that an admin call has asked for, in place of the settings' two."""

    async def story() -> None:
        config = ServeConfig(workers=2, data_parallel_size=2)
        fleet = PlainFleet(config)
        fleet.groups, fleet.threads = asked, 8
        coordinator = Coordinator(config, str(tmp_path), fleet)
        async with asyncio.timeout(10):
            while not (await coordinator.readiness()).ready:
                await asyncio.sleep(0.005)
        specs = [worker.target.spec for worker in fleet.workers.values()]
        assert [(s.num_threads, s.node_threads, s.node_workers) for s in specs] == [
            (num_threads, node_threads, node_workers)
        ] * 2
        await coordinator.shutdown()

    asyncio.run(story())
