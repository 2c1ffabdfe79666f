"""Runs a planner in a process that ends, at a low priority, because on a CPU node it runs beside the model.

A task of Ray's would need two processes that Ray starts at the model's priority: two seconds of the cores for which
steps wait, and 100 MB that stay. Where somebody waits for the plan, this process starts at that priority too, for
half a second at most. It would lengthen every hundredth step of a server that looks at its placement each minute.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, BinaryIO

from elastic_moe.actors.stillness import ended_if_still
from elastic_moe.cluster.errors import EmoeError, NotReadyError
from elastic_moe.cluster.interpreter import command_of
from elastic_moe.optimizer import PlacementProblem, PlanResult, plan

logger = logging.getLogger(__name__)

TRIES = 2
"""Processes that are started for a plan. The system may end one, for its memory."""
_NICENESS = 10
"""A tenth of what a worker gets of a core, so that a plan is found also where all cores are busy."""


async def plan_apart(
    problem: PlacementProblem, *, planner: str, deadline_s: float, solver: str, urgent: bool = False
) -> PlanResult:
    """What `plan` returns for these arguments. The process ends with the call, also where the call is cancelled.

    urgent: somebody waits for the plan, so the process gives way only when it has started.
    Raises the EmoeErrors of `plan`, NotReadyError where one process after another fails, and OSError where none can be
    started.
    """
    for _ in range(TRIES):
        process = await asyncio.to_thread(_start, urgent=urgent)
        try:
            answer = await asyncio.to_thread(_ask, process, _parts_of((problem, deadline_s, planner, solver)))
        finally:
            process.kill()
        if not process.returncode:
            break
        logger.warning("a planner's process ended with code %d", process.returncode)
    else:
        raise NotReadyError(f"planners' processes end before they answer, the last with code {process.returncode}")
    said: PlanResult | EmoeError = pickle.loads(answer)
    if isinstance(said, EmoeError):
        raise said
    return said


def _start(*, urgent: bool) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        command_of(main),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Ctrl-C is meant for the server, which then ends the process. Not in a session of its own: where Linux groups
        # sessions it would get as much of the cores as all workers. A low weight for its group would mend that, but
        # under it Linux 6.18 lets the server keep the kernel's network threads waiting for hundreds of milliseconds
        process_group=0,
    )
    if not urgent:
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
    return process


def _ask(process: subprocess.Popen[bytes], question: Iterable[bytes | memoryview]) -> bytes:
    """The answer; what it is worth, the process's exit status says. Blocks."""
    assert process.stdin is not None
    assert process.stdout is not None
    # a solver may be a process of its own, for which it waits
    with ended_if_still(process, may_wait=True) as ended:
        with suppress(BrokenPipeError), process.stdin as stdin:
            for part in question:
                stdin.write(part)
        with process.stdout as stdout:
            answer = stdout.read()
        process.wait()
    if ended.why is not None:
        logger.warning("a planner's process was ended: %s", ended.why)
    return answer


def _parts_of(value: Any) -> list[bytes | memoryview]:
    """`value`, for `_read`: what follows the numbers of bytes is its pickle and, without a copy, its arrays, which have
    30 MB for 58 layers of 256 experts: a copy of them would hold the event loop."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    parts: list[bytes | memoryview] = [head, *(array.raw() for array in arrays)]
    sizes = [memoryview(part).nbytes for part in parts]
    return [struct.pack(f"<{1 + len(sizes)}q", len(sizes), *sizes), *parts]


def _read(source: BinaryIO) -> Any:
    (count,) = struct.unpack("<q", source.read(8))
    sizes = struct.unpack(f"<{count}q", source.read(8 * count))
    head, *arrays = (bytearray(source.read(size)) for size in sizes)
    return pickle.loads(head, buffers=arrays)


def main() -> None:
    """The process itself: reads the pickled question, and writes the pickled plan, or the error, to standard output."""
    # what a solver prints goes to the log
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    problem, deadline_s, planner, solver = _read(sys.stdin.buffer)
    os.setpriority(os.PRIO_PROCESS, os.getpid(), _NICENESS)
    said: PlanResult | EmoeError
    try:
        said = plan(problem, deadline_s, planner=planner, solver=solver)
    except EmoeError as error:
        said = error
    with os.fdopen(answer, "wb") as out:
        pickle.dump(said, out)
