"""Calls to other actors, several at a time: with a limit of time, and errors as values."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from elastic_moe.actors.stillness import until_left
from elastic_moe.cluster.errors import EmoeError
from elastic_moe.cluster.lines import ending, single_line

Key = TypeVar("Key")
T = TypeVar("T")

LOOKS = 10
"""Number of parts that a time-out is cut into."""

LONGEST_CAUSE = 500

CALL_ERRORS = (RayError, EmoeError, TimeoutError, OSError)
"""Errors of a remote call that failed in the other process or on the way."""


_DEATHS = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)


def is_death(error: BaseException) -> bool:
    """Whether the error means that the called actor is gone or out of reach, and not that its method failed."""
    return isinstance(error, _DEATHS) and not isinstance(error, RayTaskError)


def one_line(error: BaseException) -> str:
    """The error in one line for people, without Ray's traceback."""
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    if isinstance(cause, OutOfMemoryError):
        return "Ray ended its process, since the memory of its machine was nearly full"
    if is_death(cause):
        return "its process died"
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    text = single_line(str(cause))
    if isinstance(cause, EmoeError):
        return text
    return f"{type(cause).__name__}: {ending(text, LONGEST_CAUSE)}"


class Turns:
    """Callers go on one after another, in the order in which they came, each in a turn of the event loop of its own: so
    what is done for every worker is spread, and heartbeats get their turns in between."""

    def __init__(self) -> None:
        self._taken = asyncio.Lock()

    async def take(self) -> None:
        async with self._taken:
            await asyncio.sleep(0)


async def within(work: Awaitable[T], timeout_s: float) -> T:
    """The result of `work`. Raises TimeoutError, and cancels it, where it takes longer than `timeout_s`.

    Time counts only while this process's own event loop runs: an answer that waits to be read is not late. So the time
    is cut into `LOOKS` parts, and each is over when the loop has looked for answers once more, however late it does.
    """
    with until_left(work) as task:
        done, _ = await wait_within([task], timeout_s, asyncio.FIRST_COMPLETED)
        if not done:
            raise TimeoutError(f"no answer in {timeout_s:g} s")
        return task.result()


async def wait_within(
    tasks: Iterable[asyncio.Future[T]], timeout_s: float, until: str = asyncio.ALL_COMPLETED
) -> tuple[set[asyncio.Future[T]], set[asyncio.Future[T]]]:
    """As asyncio.wait, but time counts only while this process's own event loop runs (see `within`)."""
    pending = set(tasks)
    for _ in range(LOOKS):
        done, rest = await asyncio.wait(pending, timeout=timeout_s / LOOKS, return_when=until)
        failed = any(not task.cancelled() and task.exception() is not None for task in done)
        if not rest or (done and until == asyncio.FIRST_COMPLETED) or (failed and until == asyncio.FIRST_EXCEPTION):
            return done, rest
    return done, rest


async def sign_of_life(call: Callable[[], Awaitable[T]], timeout_s: float) -> T:
    """The answer to a call that every process answers at once unless it hangs. Raises TimeoutError if it hangs.

    The call is made twice, each with half of the time, because a call may be lost.
    """
    with contextlib.suppress(TimeoutError):
        return await within(call(), timeout_s / 2)
    return await within(call(), timeout_s / 2)


async def call_all(calls: Mapping[Key, Awaitable[Any]], timeout_s: float) -> dict[Key, BaseException]:
    """Await all; return the errors by key, TimeoutError for those that took too long. Never raises CALL_ERRORS."""

    async def one(call: Awaitable[Any]) -> BaseException | None:
        try:
            await within(call, timeout_s)
        except CALL_ERRORS as error:
            return error
        return None

    outcomes = await asyncio.gather(*(one(call) for call in calls.values()))
    return {key: error for key, error in zip(calls, outcomes, strict=True) if error is not None}


async def call_until_error(calls: Mapping[Key, Awaitable[Any]], timeout_s: float) -> dict[Key, BaseException]:
    """Await all, but not beyond the first error: the others may be waiting for the one that failed.

    Returns the errors by key; TimeoutError for every call that had not returned by then without any error.
    """
    tasks: dict[asyncio.Future[Any], Key] = {asyncio.ensure_future(_returned(c)): key for key, c in calls.items()}
    done, pending = await wait_within(tasks, timeout_s, asyncio.FIRST_EXCEPTION)
    await _cancel(pending)
    errors = {tasks[task]: error for task in done if (error := task.exception()) is not None}
    for error in errors.values():
        if not isinstance(error, CALL_ERRORS):
            raise error
    if not errors:
        errors = {tasks[task]: TimeoutError(f"no answer in {timeout_s:g} s") for task in pending}
    return errors


async def _returned(call: Awaitable[Any]) -> Any:
    return await call


async def _cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
