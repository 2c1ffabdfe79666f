"""What is set aside is not looked at again, and cycles in it go once there are no requests."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from elastic_moe.actors import garbage


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_cycles_that_nobody_has_any_more_are_not_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "SET_ASIDE_S", 0.001)

    async def work() -> None:
        task = asyncio.create_task(garbage.keep_collections_short(lambda: 1))
        gone = weakref.ref(Cycle())
        async with asyncio.timeout(10):
            while gone() is not None:
                await asyncio.sleep(0.001)
        task.cancel()

    gc.collect()
    gc.disable()
    try:
        asyncio.run(work())
    finally:
        gc.enable()


def test_cycles_are_collected_once_there_are_no_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "SET_ASIDE_S", 0.001)
    monkeypatch.setattr(garbage, "COLLECT_S", 0.0)
    requests = 1

    async def work() -> None:
        nonlocal requests
        task = asyncio.create_task(garbage.keep_collections_short(lambda: requests))
        cycle = Cycle()
        gone = weakref.ref(cycle)
        before = gc.get_freeze_count()
        while gc.get_freeze_count() <= before:
            await asyncio.sleep(0.001)
        del cycle
        gc.collect()
        # the collector has not looked at it
        assert gone() is not None
        requests = 0
        async with asyncio.timeout(10):
            while gone() is not None:
                await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(work())
