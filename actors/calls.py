"""Calls to other actors, several at a time: with a limit of time, and errors as values."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from cluster.errors import EmoeError
from cluster.lines import ending, single_line

Key = TypeVar("Key")

LONGEST_CAUSE = 500

CALL_ERRORS = (RayError, EmoeError, TimeoutError, OSError)
"""What a remote call raises that went wrong over there, or on the way."""


_DEATHS = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)


def is_death(error: BaseException) -> bool:
    """Whether the called actor is gone (or out of reach), rather than unhappy."""
    return isinstance(error, _DEATHS) and not isinstance(error, RayTaskError)


def one_line(error: BaseException) -> str:
    """What people should read of an error: without Ray's traceback, without line breaks."""
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


def node_address() -> str:
    """The IP address that other nodes reach this one by."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


async def sign_of_life(method: Any, timeout_s: float) -> Any:
    """The answer to a call that is always answered at once. Raises TimeoutError where the callee hangs.

    Asked twice: an answer that came while this process itself was held up must not count as late.
    """
    with contextlib.suppress(TimeoutError):
        return await asyncio.wait_for(method.remote(), timeout_s / 2)
    return await asyncio.wait_for(method.remote(), timeout_s / 2)


async def call_all(calls: Mapping[Key, Awaitable[Any]], timeout_s: float) -> dict[Key, BaseException]:
    """Await all; return the errors by key, TimeoutError for those that took too long. Never raises CALL_ERRORS."""

    async def one(call: Awaitable[Any]) -> BaseException | None:
        try:
            await asyncio.wait_for(call, timeout_s)
        except CALL_ERRORS as error:
            return error
        return None

    outcomes = await asyncio.gather(*(one(call) for call in calls.values()))
    return {key: error for key, error in zip(calls, outcomes, strict=True) if error is not None}


async def call_until_error(calls: Mapping[Key, Awaitable[Any]], timeout_s: float) -> dict[Key, BaseException]:
    """Await all, but not beyond the first error: the others may be waiting for the one that failed.

    Returns the errors by key; TimeoutError for every call that had not returned by then without any error.
    """
    tasks = {asyncio.ensure_future(_returned(call)): key for key, call in calls.items()}
    done, pending = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
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
