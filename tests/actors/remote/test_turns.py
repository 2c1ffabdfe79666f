from __future__ import annotations

import asyncio

from elastic_moe.actors.remote.turns import Turns


def test_others_get_the_loop_between_two_callers() -> None:
    done: list[str] = []

    async def work(turns: Turns, name: str) -> None:
        await turns.take()
        done.append(name)

    async def other(tasks: list[asyncio.Task[None]]) -> None:
        while not all(task.done() for task in tasks):
            if done and done[-1] != "other":
                done.append("other")
            await asyncio.sleep(0)

    async def scenario() -> None:
        turns = Turns()
        tasks = [asyncio.create_task(work(turns, name)) for name in "abc"]
        await other(tasks)

    asyncio.run(scenario())
    assert done == ["a", "other", "b", "other", "c", "other"] or done == ["a", "other", "b", "other", "c"]


def test_one_that_is_cancelled_keeps_nobody_waiting() -> None:
    async def scenario() -> None:
        turns = Turns()
        first, second, third = (asyncio.create_task(turns.take()) for _ in range(3))
        await asyncio.sleep(0)
        second.cancel()
        async with asyncio.timeout(10):
            await asyncio.gather(first, third)

    asyncio.run(scenario())
