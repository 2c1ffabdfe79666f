"""The reports of an API replica to the coordinator: how many requests run here, and whether new ones are refused."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.liveness import CHECK_IN_S, HANG_S
from elastic_moe.actors.remote.ask import Remote, ask
from elastic_moe.actors.remote.calls import CALL_ERRORS, one_line, within

logger = logging.getLogger(__name__)

BUSY_S = 0.1
"""Seconds between two reports of a replica that finishes its last requests."""


class Replica(Protocol):
    draining: bool
    """Whether it refuses new requests."""

    @property
    def running(self) -> int: ...


async def check_in(coordinator: Remote[Coordinator], name: str, replica: Replica) -> None:
    """Tell the coordinator what runs at this replica, and hear whether the server stops. Never returns."""
    while True:
        refuses = replica.draining
        try:
            answer = ask(coordinator, Coordinator.check_in, name, replica.running, refuses)
            # a stop is for good: a coordinator that was restarted meanwhile may not know of it yet
            replica.draining = await within(answer, CHECK_IN_S + HANG_S) or refuses
            # the first report after the stop, which everybody waits for, goes at once
            await asyncio.sleep(BUSY_S if refuses else 0)
        except CALL_ERRORS as error:
            logger.debug("the coordinator does not hear this replica: %s", one_line(error))
            await asyncio.sleep(CHECK_IN_S)
