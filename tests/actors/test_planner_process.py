"""A planner's process gives way to the model, plans what `plan` does, and ends with its call."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterable

import numpy as np
import psutil
import pytest

from elastic_moe.actors import planner_process, stillness
from elastic_moe.actors.planner_process import TRIES, plan_apart
from elastic_moe.cluster.errors import ConfigError, NotReadyError
from elastic_moe.cluster.placement import Worker, WorkerId, contiguous
from elastic_moe.optimizer import PlacementProblem, PlanResult, plan

WORKERS = tuple(Worker(id=WorkerId(f"w{n}"), node="n", slots=4) for n in range(2))
PROBLEM = PlacementProblem(
    loads=np.random.default_rng(0).uniform(1, 9, (2, 8)),
    workers=WORKERS,
    top_k=2,
    current=contiguous(2, 8, WORKERS),
)


def test_it_plans_what_plan_does() -> None:
    apart = asyncio.run(plan_apart(PROBLEM, planner="greedy", deadline_s=5.0, solver="highs"))
    assert apart.placement == plan(PROBLEM, 5.0, planner="greedy").placement
    assert not psutil.Process().children()


@pytest.mark.parametrize("urgent", [False, True])
def test_it_starts_at_the_models_priority_only_where_somebody_waits(
    urgent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(process: subprocess.Popen[bytes], _: Iterable[bytes | memoryview]) -> bytes:
        # it waits for its question, and has done nothing yet
        begun.append(psutil.Process(process.pid).nice())
        process.terminate()
        process.communicate()
        return b""

    begun: list[int] = []
    monkeypatch.setattr(planner_process, "_ask", look)
    with pytest.raises(NotReadyError):
        asyncio.run(plan_apart(PROBLEM, planner="greedy", deadline_s=5.0, solver="highs", urgent=urgent))
    assert begun == TRIES * [psutil.Process().nice() if urgent else 10]


def test_errors_come_back() -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        asyncio.run(plan_apart(PROBLEM, planner="astrology", deadline_s=5.0, solver="highs"))


@pytest.mark.parametrize("urgent", [False, True])
def test_it_gives_way_and_ends_with_the_call(urgent: bool) -> None:
    async def give_up() -> tuple[int, int, int, psutil.Process]:
        asked = asyncio.create_task(plan_apart(PROBLEM, planner="auto", deadline_s=60.0, solver="highs", urgent=urgent))
        while not (children := psutil.Process().children()):
            await asyncio.sleep(0.001)
        async with asyncio.timeout(60):
            while children[0].nice() == psutil.Process().nice():
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        child = children[0]
        nice, session, group = child.nice(), os.getsid(child.pid), os.getpgid(child.pid)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        return nice, session, group, child

    nice, session, group, child = asyncio.run(give_up())
    assert nice == 10
    # in another session it would get as much of the cores as all workers together where Linux groups sessions
    assert session == os.getsid(0)
    # in the same group Ctrl-C would end it before the server has
    assert group == child.pid
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()


def test_another_process_is_asked_where_one_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    async def planned(ended: int) -> PlanResult:
        asked = asyncio.create_task(plan_apart(PROBLEM, planner="greedy", deadline_s=5.0, solver="highs"))
        gone: set[int] = set()
        while len(gone) < ended:
            for child in psutil.Process().children():
                if child.pid not in gone and "planner_process" in " ".join(child.cmdline()):
                    child.kill()
                    gone.add(child.pid)
            await asyncio.sleep(0.001)
        return await asked

    assert asyncio.run(planned(1)).placement == plan(PROBLEM, 5.0, planner="greedy").placement
    assert "ended with code -9" in caplog.text
    with pytest.raises(NotReadyError, match="end before they answer, the last with code -9"):
        asyncio.run(planned(TRIES))


def test_one_that_is_stopped_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stillness, "STOPPED_S", 0.5)

    async def work() -> PlanResult:
        asked = asyncio.create_task(plan_apart(PROBLEM, planner="greedy", deadline_s=5.0, solver="highs"))
        # it is another Python by then: one that is stopped before is waited for by its parent
        while not (children := [c for c in psutil.Process().children() if "planner_process" in " ".join(c.cmdline())]):
            await asyncio.sleep(0.001)
        children[0].suspend()
        async with asyncio.timeout(60):
            return await asked

    assert asyncio.run(work()).placement == plan(PROBLEM, 5.0, planner="greedy").placement
    assert not psutil.Process().children()
