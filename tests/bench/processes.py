"""Measures a server's processes: memory without counting shared pages twice, and CPU time by its purpose."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from pathlib import Path

import psutil

MODEL = "model"
_TITLES = (
    ("ray::Engine", "engine"),
    ("ray::ServeReplica", "API"),
    ("ray::Coordinator", "control plane"),
    ("ray::Migrator", "control plane"),
    ("ray::ServeController", "Ray Serve"),
    ("ray::ProxyActor", "Ray Serve"),
    ("ray::HAProxyManager", "Ray Serve"),
)
_MODULES = ("planner_process", "forkserver.server")
_WORKER = "ray::WorkerActor"

CpuTimes = dict[tuple[int, int], tuple[str, float]]
"""(process, thread or 0) -> what it is for, and its CPU seconds so far."""


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started, directly or not."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def memory_bytes(pid: int) -> int:
    """Proportional set sizes of the whole family: a page that n processes share counts 1/n in each."""
    total = 0
    for process in family(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def purpose(name: str, command: str) -> str:
    """What a process is for, by its name and command line."""
    for title, group in _TITLES:
        if command.startswith(title):
            return group
    if name == "haproxy":
        return "HAProxy"
    ours = name == "emoe" or any(module in command for module in _MODULES)
    return "control plane" if ours else "Ray"


def cpu_times(pid: int) -> CpuTimes:
    """CPU seconds of this project's server. Those of a worker are split by thread: the model's, and Ray's."""
    times: CpuTimes = {}
    for process in family(pid):
        with contextlib.suppress(psutil.Error, OSError):
            command = " ".join(process.cmdline())
            if not command.startswith(_WORKER):
                used = process.cpu_times()
                times[process.pid, 0] = (purpose(process.name(), command), used.user + used.system)
                continue
            for thread in process.threads():
                title = Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text()
                # Ray names its own threads; the first one is the actor's event loop
                ray = not title.startswith("ray::") or thread.id == process.pid
                group = "workers' Ray threads" if ray else MODEL
                times[process.pid, thread.id] = (group, thread.user_time + thread.system_time)
    return times


def cpu_between(before: CpuTimes, after: CpuTimes) -> dict[str, float]:
    """CPU seconds by purpose, largest first. What ended in between is not counted."""
    total: defaultdict[str, float] = defaultdict(float)
    for key, (group, seconds) in after.items():
        total[group] += seconds - before.get(key, (group, 0.0))[1]
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def share_beside_model(cpu_s: dict[str, float]) -> float:
    """CPU time that is not the model's: HTTP, Ray, detokenising, and scheduling and control too."""
    return 1 - cpu_s.get(MODEL, 0.0) / sum(cpu_s.values())
