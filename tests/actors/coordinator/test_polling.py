"""A sign of life, and what says sooner that there will be none."""

from __future__ import annotations

import asyncio
import socket

import pytest

from elastic_moe.actors import liveness
from elastic_moe.actors.coordinator.polling import unless_refused
from elastic_moe.cluster.errors import StepAborted, WorkerError
from elastic_moe.cluster.messages.requests import Endpoint

NOBODY = Endpoint(address="127.0.0.1", port=1, token="")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "RAY_KNOWS_S", 0.05)


async def never() -> None:
    await asyncio.Event().wait()


async def soon(error: Exception | None = None) -> None:
    await asyncio.sleep(0.01)
    if error is not None:
        raise error


def test_a_machine_that_is_gone_refuses_at_once_what_ray_waits_for() -> None:
    with pytest.raises(WorkerError, match="its process died"):
        asyncio.run(unless_refused(never(), NOBODY))


def test_ray_may_know_better() -> None:
    asyncio.run(unless_refused(soon(), NOBODY))
    with pytest.raises(StepAborted, match="memory"):
        asyncio.run(unless_refused(soon(StepAborted("memory")), NOBODY))


def test_an_open_door_says_nothing_of_a_process_that_hangs() -> None:
    async def work(door: Endpoint | None) -> None:
        async with asyncio.timeout(0.2):
            await unless_refused(never(), door)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        door = Endpoint(address="127.0.0.1", port=listener.getsockname()[1], token="")
        for known in (door, None):
            with pytest.raises(TimeoutError):
                asyncio.run(work(known))
