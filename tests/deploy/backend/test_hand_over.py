"""An API replica takes over from the ones before it, over coordinators that only pretend."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import NotReadyError, PlacementError
from elastic_moe.cluster.messages.views import Readiness
from elastic_moe.cluster.redeploy import Generation
from elastic_moe.deploy.backend import hand_over
from tests.actors.fakes import Handle

OLD, NEW = Generation("old"), Generation("new")
READY = Readiness(ready=True, reason="serving")
LOADS = Readiness(ready=False, reason="starting")
FAILED = Readiness(ready=False, reason="damaged", error="shard 3 is damaged")


class FakeCoordinator:
    def __init__(self, state: Readiness, refuses: bool = False) -> None:
        self.state, self.refuses = state, refuses
        self.has_asked = False
        self.polls = 0
        self.configured: list[ServeConfig] = []

    async def readiness(self) -> Readiness:
        return self.state

    async def needs_way(self) -> bool:
        self.polls += 1
        return self.has_asked

    async def reconfigure(self, config: ServeConfig) -> None:
        if self.refuses:
            raise PlacementError("workers: expected 1 to 8, got 9")
        self.configured.append(config)


class FakeClusters:
    def __init__(self, **coordinators: FakeCoordinator) -> None:
        self.handles = {Generation(name): Handle(actor) for name, actor in coordinators.items()}
        self.withdrawn: list[Generation] = []

    def coordinators(self) -> dict[Generation, Remote[Any]]:
        return {name: Remote(handle) for name, handle in self.handles.items()}

    def withdraw(self, generation: Generation) -> None:
        self.withdrawn.append(generation)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_over, "READY_POLL_S", 0.01)


def begin(new: FakeCoordinator, clusters: FakeClusters, config: ServeConfig) -> asyncio.Task[bool]:
    taking = hand_over.take_over(config, NEW, [Remote(clusters.handles[NEW])], new.readiness, clusters)
    return asyncio.get_running_loop().create_task(taking)


@pytest.mark.parametrize("end", ["ready", "old one ends", "old one fails", "asked for way"])
def test_it_waits_while_the_old_cluster_serves_and_no_longer(end: str) -> None:
    async def story() -> None:
        old, new = FakeCoordinator(READY), FakeCoordinator(LOADS)
        clusters, config = FakeClusters(old=old, new=new), ServeConfig(workers=3)
        taking = begin(new, clusters, config)
        async with asyncio.timeout(5):
            # by then the old cluster has been seen to serve
            while new.polls < 2:
                await asyncio.sleep(0.01)
        assert new.configured == [config]
        assert not taking.done(), "the old replicas go on meanwhile"
        if end == "ready":
            new.state = READY
        elif end == "old one ends":
            clusters.handles[OLD].dead = True
        elif end == "asked for way":
            new.has_asked = True
        else:
            old.state = FAILED
        async with asyncio.timeout(5):
            assert await taking is (end != "ready"), "whether requests are to wait"
        assert clusters.withdrawn == []

    asyncio.run(story())


def test_all_groups_take_the_settings_over_and_those_too_many_hear_of_it() -> None:
    async def story() -> None:
        first, second, third = (FakeCoordinator(LOADS) for _ in range(3))
        old = FakeCoordinator(FAILED)
        clusters = FakeClusters(**{"old": old, "new": first, "new.1": second, "new.2": third})
        config = ServeConfig(data_parallel_size=2)
        own = [Remote[Any](clusters.handles[Generation(name)]) for name in ("new", "new.1")]
        async with asyncio.timeout(5):
            assert not await hand_over.take_over(config, NEW, own, first.readiness, clusters)
        assert [group.configured for group in (first, second, third, old)] == [[config]] * 3 + [[]]

    asyncio.run(story())


def test_another_group_of_its_own_that_serves_is_no_cluster_to_wait_for() -> None:
    async def story() -> None:
        first, second = FakeCoordinator(LOADS), FakeCoordinator(READY)
        clusters = FakeClusters(**{"new": first, "new.1": second})
        own = [Remote[Any](handle) for handle in clusters.handles.values()]
        async with asyncio.timeout(5):
            assert not await hand_over.take_over(ServeConfig(), NEW, own, first.readiness, clusters)

    asyncio.run(story())


def test_without_another_cluster_it_answers_at_once_and_ready_says_why_it_cannot_serve() -> None:
    async def story() -> None:
        new = FakeCoordinator(FAILED)
        async with asyncio.timeout(5):
            assert not await begin(new, FakeClusters(new=new), ServeConfig())

    asyncio.run(story())


@pytest.mark.parametrize(
    ("new", "message", "withdrawn"),
    [
        (FakeCoordinator(FAILED), "cannot take over: shard 3 is damaged", [NEW]),
        # it serves, with the settings that it has
        (FakeCoordinator(READY, refuses=True), "cannot take over: workers: expected 1 to 8, got 9", []),
    ],
)
def test_one_that_cannot_serve_leaves_the_old_cluster_wanted(
    new: FakeCoordinator, message: str, withdrawn: list[Generation]
) -> None:
    async def story() -> None:
        clusters = FakeClusters(old=FakeCoordinator(READY), new=new)
        with pytest.raises(NotReadyError, match=message):
            await begin(new, clusters, ServeConfig())
        assert clusters.withdrawn == withdrawn

    asyncio.run(story())
