"""Spreads work that is done for every worker over turns of the event loop, so that heartbeats get theirs in between."""

from __future__ import annotations

import asyncio


class Turns:
    """Callers go on one after another, in the order in which they came, each in a turn of the loop of its own."""

    def __init__(self) -> None:
        self._taken = asyncio.Lock()

    async def take(self) -> None:
        async with self._taken:
            await asyncio.sleep(0)
