"""Says in the log where something holds an event loop for too long, while nothing else on it can run.

The loop notes the time every `HELD_S` seconds. Where a note is late, a thread looks at what the loop's thread does, and
when the loop goes on, one line tells how long it was held and where. A process that got no processor is not blamed: the
loop's thread must have computed for `HELD_S` seconds, or have been found somewhere and stood still for `BLOCKED_S`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from types import FrameType

logger = logging.getLogger(__name__)

HELD_S = 0.010
"""Seconds from which on a loop counts as held."""
BLOCKED_S = 0.250
"""Seconds from which on it counts as held although its thread did not compute, if it was not waiting for events."""
_WAITING = ("select", "run_forever", "run_until_complete")
"""Innermost functions of a loop that has nothing to do. Where it is late then, its process had no processor."""
QUIET_S = 60.0
"""Seconds in which each place is reported once at most."""
_DEPTH = 4
"""Number of calls in the report of a place."""


class LoopWatch:
    """Watches the event loop that runs `watch`."""

    def __init__(self, name: str) -> None:
        """`name` is the process's in the log."""
        self._name = name
        self._noted_at = 0.0
        self._thread = 0
        self._place = ""
        """Where the loop's thread was when a note was late; empty if none is."""
        self._ended = False
        self._computed_s = 0.0
        """Seconds that the loop's thread had computed at the last note."""
        self._timer: asyncio.TimerHandle
        self._told: dict[str, float] = {}
        self.longest_s = 0.0
        """The longest time for which the loop was held."""

    async def watch(self) -> None:
        """Never returns."""
        loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._noted_at, self._computed_s = time.monotonic(), time.thread_time()
        threading.Thread(target=self._look, name="loop watch", daemon=True).start()
        try:
            # a task that sleeps so often would take a percent of a core
            self._timer = loop.call_later(HELD_S, self._note, loop)
            await loop.create_future()
        finally:
            self._ended = True
            self._timer.cancel()

    def _note(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(HELD_S, self._note, loop)
        now, computed_s = time.monotonic(), time.thread_time()
        late_s, place, before_s = now - self._noted_at - HELD_S, self._place, self._computed_s
        self._noted_at, self._place, self._computed_s = now, "", computed_s
        self._judge(late_s, computed_s - before_s, place, now)

    def _look(self) -> None:
        while not self._ended:
            time.sleep(HELD_S)
            if not self._place and time.monotonic() - self._noted_at > 2 * HELD_S:
                self._place = _place_of_thread(self._thread)

    def _judge(self, late_s: float, computed_s: float, place: str, now: float) -> None:
        blocked = bool(place) and late_s >= BLOCKED_S
        if late_s < HELD_S or (computed_s < HELD_S and not blocked):
            return
        self.longest_s = max(self.longest_s, late_s)
        place = place or "a place that was left too soon to be seen"
        if now - self._told.get(place, -QUIET_S) < QUIET_S:
            return
        self._told[place] = now
        logger.info(
            "the event loop of %s was held for %.0f ms, in which it computed for %.0f ms, at %s",
            self._name,
            1e3 * late_s,
            1e3 * computed_s,
            place,
        )


def _place_of_thread(thread: int) -> str:
    """Where it is; empty if it waits for events. A function of its own, so that the frame, and with it all that the
    thread has in hand, is let go at once."""
    frame = sys._current_frames().get(thread)
    return "" if frame is None or frame.f_code.co_name in _WAITING else place_of(frame)


def place_of(frame: FrameType) -> str:
    """The innermost calls of a thread, the innermost first."""
    calls: list[str] = []
    at: FrameType | None = frame
    while at is not None and len(calls) < _DEPTH:
        code = at.f_code
        calls.append(f"{code.co_qualname} ({code.co_filename.rpartition('/')[2]}:{at.f_lineno})")
        at = at.f_back
    return ", called by ".join(calls)
