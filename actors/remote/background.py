"""Tasks of an event loop that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

Failed = Callable[[BaseException], None]


class Background:
    """Keeps each task until it ends (the event loop keeps no reference of its own) and reports those that fail."""

    def __init__(self, failed: Failed) -> None:
        """`failed` gets what a task raised: nobody else would see it."""
        self._failed = failed
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def cancel(self) -> None:
        """Cancel every task but the one that calls this."""
        for task in self._tasks:
            if task is not asyncio.current_task(task.get_loop()):
                task.cancel()

    async def settle(self) -> None:
        """Wait until all have ended, except for the one that calls this."""
        await asyncio.gather(*self._tasks - {asyncio.current_task()}, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)
