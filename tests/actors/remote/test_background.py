"""Tasks that nobody waits for."""

from __future__ import annotations

import asyncio

from elastic_moe.actors.remote.background import Background


async def _fail() -> None:
    raise ValueError("it failed")


def test_what_a_task_raises_is_told() -> None:
    told: list[BaseException] = []

    async def run() -> None:
        background = Background(told.append)
        background.start(_fail())
        background.start(asyncio.sleep(0))
        await background.settle()
        await asyncio.sleep(0)

    asyncio.run(run())
    assert [str(error) for error in told] == ["it failed"]


def test_the_task_that_cancels_the_others_goes_on() -> None:
    told: list[BaseException] = []
    ended: list[str] = []

    async def run() -> None:
        background = Background(told.append)

        async def stop() -> None:
            background.cancel()
            await background.settle()
            ended.append("stop")

        background.start(asyncio.sleep(60))
        background.start(stop())
        while not ended:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(run(), 5))
    assert ended == ["stop"]
    assert not told
