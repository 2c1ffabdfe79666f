"""Calls to other processes: what their errors say, and time-outs that count only while the caller's loop runs."""

from __future__ import annotations

import asyncio
import time

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from elastic_moe.actors.remote.calls import Turns, call_all, call_until_error, is_death, one_line, sign_of_life, within
from elastic_moe.cluster.errors import NotReadyError

MEMORY = "Ray ended its process, since the memory of its machine was nearly full"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ActorDiedError(), "its process died"),
        (ActorUnavailableError("away", b"0" * 16), "its process died"),
        (NodeDiedError("node"), "its process died"),
        (WorkerCrashedError(), "its process died"),
        # of its memory monitor; not an actor's error to Ray
        (OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node ..."), MEMORY),
    ],
)
def test_a_process_that_is_gone(error: RayError, told: str) -> None:
    assert is_death(error)
    assert one_line(error) == told


@pytest.mark.parametrize("error", [NotReadyError("wait"), TimeoutError(), OSError("no")])
def test_a_process_that_is_there(error: Exception) -> None:
    assert not is_death(error)
    assert not is_death(RayTaskError("f", "traceback", error))


STALL_S = 0.15
TIMEOUT_S = 0.1


async def held_up() -> int:
    """Answers a few turns of the loop after the loop has stood still for longer than the time-out."""
    await asyncio.sleep(0)
    time.sleep(STALL_S)
    for _ in range(4):
        await asyncio.sleep(0)
    return 7


def test_an_answer_that_came_during_a_stall_is_not_late() -> None:
    async def work() -> None:
        assert await within(held_up(), TIMEOUT_S) == 7
        assert await sign_of_life(held_up, TIMEOUT_S) == 7
        assert await call_all({"a": held_up(), "b": held_up()}, TIMEOUT_S) == {}
        assert await call_until_error({"a": held_up()}, TIMEOUT_S) == {}

    asyncio.run(work())


def test_silence_is_a_time_out() -> None:
    async def work() -> None:
        silent = asyncio.get_running_loop().create_future()
        with pytest.raises(TimeoutError):
            await within(silent, 0.02)
        assert silent.cancelled()
        errors = await call_all({"a": asyncio.Event().wait()}, 0.02)
        assert isinstance(errors["a"], TimeoutError)
        errors = await call_until_error({"a": asyncio.Event().wait(), "b": asyncio.sleep(0)}, 0.02)
        assert list(errors) == ["a"]

    asyncio.run(work())


def test_the_callees_errors_are_raised() -> None:
    async def fail() -> None:
        raise OSError("gone")

    async def work() -> None:
        with pytest.raises(OSError, match="gone"):
            await within(fail(), 5)
        errors = await call_until_error({"a": asyncio.Event().wait(), "b": fail()}, 5)
        assert list(errors) == ["b"]

    asyncio.run(work())


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
