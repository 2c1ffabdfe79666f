"""Several answers in one stream: their order, their end, and a reader that pauses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from elastic_moe.deploy.backend.backend import GenerationFailed
from elastic_moe.deploy.generation.answer import Delta, merged


async def answer(
    index: int, count: int, made: list[int], error: Exception | None = None
) -> AsyncGenerator[Delta, None]:
    try:
        for number in range(count):
            await asyncio.sleep(0)
            made[index] += 1
            yield Delta(index=index, text=f"{number} ")
        if error is not None:
            raise error
    finally:
        made[index] += 1000


async def texts(deltas: AsyncGenerator[Delta, None], count: int) -> list[str]:
    found = [""] * count
    async for delta in deltas:
        found[delta.index] += delta.text
    return found


@pytest.mark.parametrize("counts", [[3], [3, 1], [0, 2, 9]])
def test_every_answer_arrives_in_order(counts: list[int]) -> None:
    made = [0] * len(counts)
    streams = [answer(index, count, made) for index, count in enumerate(counts)]
    expected = ["".join(f"{number} " for number in range(count)) for count in counts]
    assert asyncio.run(texts(merged(streams), len(counts))) == expected
    assert made == [count + 1000 for count in counts], "every answer is closed"


def test_an_error_of_one_answer_ends_the_others() -> None:
    made = [0, 0]
    streams = [answer(0, 10**9, made), answer(1, 2, made, GenerationFailed("broken"))]
    with pytest.raises(GenerationFailed, match="broken"):
        asyncio.run(texts(merged(streams), 2))
    assert made[0] > 1000


def test_answers_wait_for_a_reader_that_pauses() -> None:
    made = [0, 0, 0]

    async def read_one() -> list[int]:
        streams = [answer(index, 10**9, made) for index in range(3)]
        async with contextlib.aclosing(merged(streams)) as deltas:
            await anext(deltas)
            for _ in range(200):
                await asyncio.sleep(0)
            return made.copy()

    assert sum(asyncio.run(read_one())) <= 8, "as many deltas as answers wait, and each answer holds one more"
