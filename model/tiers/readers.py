"""Threads that read experts into slots. What a step waits for comes before what may be needed later.

The disk works while the cores compute. Two readers at least keep the disk busy: one reads while another checks what it
has read.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from elastic_moe.cluster.messages.epochs import FetchSource
from elastic_moe.model.tiers.slots import Slot

THREADS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """An expert that has been read into a slot, or the error that kept it away."""

    layer: int
    expert: int
    slot: Slot
    source: FetchSource | None
    error: Exception | None = None
    read_s: float = 0.0
    """Seconds from the arrival before it, or from its own beginning if that was later. So the mean is the time of an
    expert, however many are read at once."""


@dataclass(order=True, slots=True)
class _Job:
    rank: tuple[bool, int]
    layer: int = field(compare=False)
    expert: int = field(compare=False)
    slot: Slot = field(compare=False)


class Readers:
    """Reads in threads, which start with the first job and end with `close`. One thread submits and takes."""

    def __init__(self, read: Callable[[int, int, Slot], FetchSource], threads: int = THREADS) -> None:
        """`read(layer, expert, slot)` reads one expert. Several threads call it."""
        self._read = read
        self._count = threads
        self._threads: list[threading.Thread] = []
        self._jobs: list[_Job] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._latest = 0.0
        """When the latest read ended."""
        self.arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()

    def submit(self, layer: int, expert: int, slot: Slot, *, urgent: bool) -> None:
        """Read an expert. Urgent ones come first; otherwise the order is that of the calls."""
        with self._changed:
            heapq.heappush(self._jobs, _Job((not urgent, next(self._numbers)), layer, expert, slot))
            self._changed.notify()
        while len(self._threads) < self._count:
            thread = threading.Thread(target=self._run, name=f"experts-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """End the threads when they have done what they do now."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                job = heapq.heappop(self._jobs)
            begin = time.perf_counter()
            source, error = None, None
            try:
                source = self._read(job.layer, job.expert, job.slot)
            except Exception as failure:  # noqa: BLE001 - the thread that runs the steps raises it
                error = failure
            with self._changed:
                end = time.perf_counter()
                read_s, self._latest = end - max(begin, self._latest), end
            self.arrivals.put(
                Arrival(layer=job.layer, expert=job.expert, slot=job.slot, source=source, error=error, read_s=read_s)
            )
