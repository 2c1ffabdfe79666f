"""What a server holds on to: processes, threads, file descriptors, memory, and names in shared memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.bench import Bench, wait_for_spare

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Of all processes of a server together."""

    processes: int
    threads: int
    descriptors: int
    resident_mib: int
    segments: int
    """Names of process groups in /dev/shm."""
    kinds: Counter[str]
    """What each process's descriptors are, such as `ray::Engine socket`."""

    def __str__(self) -> str:
        return (
            f"{self.processes} processes, {self.threads} threads, {self.descriptors} descriptors, "
            f"{self.resident_mib} MiB, {self.segments} segments"
        )


def holdings(bench: Bench) -> Holdings:
    found, kinds = [], Counter[str]()
    for process in bench.family():
        try:
            if process.status() == psutil.STATUS_ZOMBIE or _is_rays(" ".join(process.cmdline())):
                continue
            kinds.update(_descriptors(process))
            found.append((process.num_threads(), process.num_fds(), process.memory_info().rss))
        except psutil.NoSuchProcess:
            continue
    return Holdings(
        processes=len(found),
        threads=sum(threads for threads, _, _ in found),
        descriptors=sum(fds for _, fds, _ in found),
        resident_mib=sum(rss for _, _, rss in found) >> 20,
        segments=sum(path.name.startswith("emoe-") for path in SHARED_MEMORY.iterdir()),
        kinds=kinds,
    )


def _is_rays(title: str) -> bool:
    """Idle workers come and go by Ray's rules, and its log monitor keeps files of the dead open, up to 200."""
    return "ray::IDLE" in title or "log_monitor.py" in title


def _descriptors(process: psutil.Process) -> Iterator[str]:
    title = " ".join(process.cmdline()).strip()[-40:]
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):
            yield f"{title} {descriptor.readlink().name.split(':')[0]}"


def _at_rest(bench: Bench) -> Holdings:
    bench.load.rest()
    wait_for_spare(bench.server)
    found = holdings(bench)
    bench.load.go_on()
    return found


def scale_cycles(bench: Bench, cycles: int, settle_after: int) -> dict[str, str]:
    """One worker more and one fewer, `cycles` times. Raises AssertionError where something grows with every cycle.

    What is there after the first `settle_after` cycles is what the server needs; afterwards nothing may be added for
    each cycle: allowed are a few descriptors and threads that come once, and memory that allocators round up.
    """
    first = None
    for cycle in range(cycles):
        for workers in (bench.workers + 1, bench.workers):
            end = bench.finish(bench.scale(workers))
            assert end["phase"] == "completed", end
        bench.settle()
        if cycle + 1 == settle_after:
            first = _at_rest(bench)
    last = _at_rest(bench)
    assert first is not None
    more = cycles - settle_after
    grown = [
        name
        for name, slack in (("processes", 0), ("segments", 0), ("threads", more), ("descriptors", 2 * more))
        if getattr(last, name) - getattr(first, name) > slack
    ]
    if last.resident_mib - first.resident_mib > 0.1 * first.resident_mib:
        grown.append("resident_mib")
    added = ", ".join(f"{count} {kind}" for kind, count in (last.kinds - first.kinds).most_common(5))
    assert not grown, f"{', '.join(grown)} grew from {first} to {last} in {more} cycles; descriptors: {added}"
    return {f"after {settle_after} cycles": str(first), f"after {cycles}": str(last)}
