"""Keeps Python's collector of cyclic garbage from holding an event loop.

A full collection looks at every object: those of the imported packages take it 20 to 50 ms, and with tens of thousands
of requests it takes a tenth of a second and more, in which no step is sent and no heartbeat is heard. What requests are
made of is freed without it, as there are no cycles in it. So what there is, is set aside again and again (`gc.freeze`),
and the collector looks at new objects alone. Cycles that are set aside stay until a collection of everything, which
waits for a time without requests.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

SET_ASIDE_S = 1.0
"""Seconds between two times at which all objects are set aside."""
YOUNG = 1
"""The oldest of the collector's generations (0 to 2) that is collected before objects are set aside."""
COLLECT_S = 600.0
"""Least seconds between two collections of everything."""


async def keep_collections_short(num_requests: Callable[[], int]) -> None:
    """Set aside what there is, again and again. Never returns. `num_requests` says how many requests there are now, or
    how much else is under way that a collection of everything would hold up."""
    collected_at = time.monotonic()
    while True:
        if not num_requests() and time.monotonic() - collected_at > COLLECT_S:
            gc.unfreeze()
            gc.collect()
            collected_at = time.monotonic()
        # of what is younger than the last time, so that few cycles are set aside in a server that never rests
        gc.collect(YOUNG)
        gc.freeze()
        await asyncio.sleep(SET_ASIDE_S)
