"""The results of calls to actors, as the API needs them."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from ray.exceptions import RayTaskError

from elastic_moe.actors.liveness import CALL_TIMEOUT_S
from elastic_moe.actors.remote.calls import within
from elastic_moe.cluster.errors import EmoeError

R = TypeVar("R")


async def result(answer: Awaitable[R], timeout_s: float = CALL_TIMEOUT_S) -> R:
    """The result of a Ray call. Raises the callee's own exception where it is one of ours, and TimeoutError."""
    try:
        return await within(answer, timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, EmoeError):
            raise error.cause from None
        raise
