"""What Ray runs once, in a process that is no actor's."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import psutil

from elastic_moe.optimizer import PlanResult, plan


def kill_process(pid: int) -> None:
    """End a worker's process. The process may be gone already and its number in use by another program."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if "WorkerActor" in " ".join(process.cmdline()):
            process.kill()


def plan_in_background(*arguments: Any, **named: Any) -> PlanResult:
    """Run a planner at the lowest priority, because on a CPU node it runs beside the model."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    return plan(*arguments, **named)
