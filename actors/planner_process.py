"""Runs a planner in a process that ends, at a low priority, because on a CPU node it runs beside the model.

A task of Ray's would need two processes that Ray starts at the model's priority: two seconds of the cores for which
steps wait, and 100 MB that stay. This process starts at that priority too, since somebody may wait for the plan, but
in 0.2 s.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from elastic_moe.cluster.errors import EmoeError
from elastic_moe.cluster.interpreter import command_of
from elastic_moe.optimizer import PlacementProblem, PlanResult, plan

_NICENESS = 10
"""A tenth of what a worker gets of a core, so that a plan is found also where all cores are busy."""


async def plan_apart(problem: PlacementProblem, *, planner: str, deadline_s: float, solver: str) -> PlanResult:
    """What `plan` returns for these arguments. The process ends with the call, also where the call is cancelled.

    Raises the EmoeErrors of `plan`, EmoeError where the process fails, and OSError where none can be started.
    """
    question = pickle.dumps((problem, deadline_s, planner, solver))
    process = await asyncio.to_thread(_start)
    try:
        answer, _ = await asyncio.to_thread(process.communicate, question)
    finally:
        process.kill()
    if process.returncode:
        raise EmoeError(f"the planner's process ended with code {process.returncode}")
    said: PlanResult | EmoeError = pickle.loads(answer)
    if isinstance(said, EmoeError):
        raise said
    return said


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command_of(main),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Ctrl-C is meant for the server, which then ends the process
        start_new_session=True,
    )


def main() -> None:
    """The process itself: reads the pickled question, and writes the pickled plan, or the error, to standard output."""
    # what a solver prints goes to the log
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    problem, deadline_s, planner, solver = pickle.load(sys.stdin.buffer)
    _give_way()
    said: PlanResult | EmoeError
    try:
        said = plan(problem, deadline_s, planner=planner, solver=solver)
    except EmoeError as error:
        said = error
    with os.fdopen(answer, "wb") as out:
        pickle.dump(said, out)


def _give_way() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    # Linux may share cores evenly among sessions, and only within one by niceness. Then a session has a niceness too
    with suppress(OSError):  # this kernel does not group them
        Path("/proc/self/autogroup").write_text(str(_NICENESS))
