import asyncio
import logging
import time

import pytest

from elastic_moe.actors.loop_watch import LoopWatch


def compute(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_loop_that_is_held_is_told_once_with_the_place(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def story() -> None:
        watch = LoopWatch("the test")
        task = asyncio.create_task(watch.watch())
        for _ in range(2):
            await asyncio.sleep(0.02)
            compute(0.2)
            await asyncio.sleep(0.02)
        task.cancel()
        assert watch.longest_s >= 0.15

    asyncio.run(story())
    (line,) = [line for line in caplog.messages if "at compute (test_loop_watch.py" in line]
    assert line.startswith("the event loop of the test was held for ")


def test_a_loop_that_waits_is_not_held(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    watch = LoopWatch("the test")
    # late by 200 ms without having computed: others had the processor
    watch._judge(0.5, 0.001, "", 100.0)
    # computed for long, but not late
    watch._judge(0.005, 0.005, "", 100.0)
    assert not caplog.messages
    watch._judge(0.3, 0.001, "here", 100.0)
    watch._judge(0.02, 0.015, "there", 100.0)
    assert [line.rpartition(" ")[2] for line in caplog.messages] == ["here", "there"]
