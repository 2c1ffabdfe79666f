"""A group of workers as the API sees it: its coordinator and its engine, which are Ray actors.

Guarantee: a request that the engine has accepted ends with its full answer, unless this process dies or the group does
not serve for `recovery_timeout_s`. The requests are in the hands of `engine` (engine_client.py). groups.py makes one
Backend of all groups.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ray.exceptions import RayActorError, RayError

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.engine.engine import Engine
from elastic_moe.actors.liveness import CALL_TIMEOUT_S, HANG_S, MOVE_S
from elastic_moe.actors.remote.ask import Remote, ask, kill
from elastic_moe.actors.remote.background import Background
from elastic_moe.cluster.errors import EmoeError, NotReadyError
from elastic_moe.cluster.messages.views import Readiness
from elastic_moe.deploy.backend.backend import P, Question, R
from elastic_moe.deploy.backend.engine_client import EngineClient
from elastic_moe.deploy.backend.gcs_watch import LOOK_S, GcsWatch
from elastic_moe.deploy.backend.ray_calls import result

logger = logging.getLogger(__name__)

READINESS_S = 0.25
"""Seconds between two questions whether the cluster is ready, until it is; then four times as many."""


class RayBackend:
    """Made and used on one event loop. `begin` starts its tasks; `end` stops them."""

    def __init__(
        self,
        coordinator: Remote[Coordinator],
        *,
        recovery_timeout_s: float,
        gcs: GcsWatch | None = None,
        number: int = 0,
        lost: Callable[[], None] = lambda: None,
        reports: Callable[[Remote[Coordinator]], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """recovery_timeout_s: seconds without a serving group after which requests end with an error. They do so too
        when `gcs`, if given, says that Ray's GCS is lost. number: of the group. lost: as EngineClient has it. reports:
        tells the coordinator what runs at this replica, as long as it uses the group.
        """
        self._reports = reports
        self._gcs = gcs
        self._coordinator = coordinator
        self._recovery_timeout_s = recovery_timeout_s
        self.served_at = 0.0
        """When the group was last seen to serve, by the monotonic clock."""
        self._unready_since: float | None = None
        """When the group was first seen not to be ready after it was; None while it is, or has never been."""
        self._has_served = False
        self._readiness = Readiness(ready=False, reason="starting")
        self._background = Background(task_failed)
        self.engine = EngineClient(self._find_engine, self._background, group=number, lost=lost)

    def begin(self) -> None:
        for work in (self._watch_readiness(), self.engine.follow()):
            self._background.start(work)
        if self._gcs is not None:
            self._background.start(self._watch_gcs(self._gcs))
        if self._reports is not None:
            self._background.start(self._reports(self._coordinator))

    def expect_service(self) -> None:
        """From now on requests may wait for the cluster to serve, although it has not done so yet."""
        self._has_served, self.served_at = True, time.monotonic()

    async def end(self) -> None:
        self._background.cancel()
        await self._background.settle()

    async def _find_engine(self) -> Remote[Engine] | None:
        try:
            return await self.ask(Coordinator.engine)
        except NotReadyError:
            return None

    @property
    def _lost(self) -> str | None:
        return None if self._gcs is None else self._gcs.lost

    async def readiness(self) -> Readiness:
        return self._readiness if self._lost is None else Readiness(ready=False, reason=self._lost)

    @property
    def can_wait(self) -> bool:
        waited_s = time.monotonic() - self.served_at
        if self._lost is not None or self._readiness.error is not None:
            return False
        return (self._has_served or self.engine.has_connected) and waited_s < self._recovery_timeout_s

    @property
    def serves(self) -> bool:
        """Whether a request that comes now is answered without a wait, as far as is known here."""
        return self._lost is None and self._readiness.ready and self.engine.current is not None

    def is_lost(self, now: float) -> bool:
        """Whether its requests had better go on in another group: its engine is gone, or its workers are for MOVE_S."""
        if self.serves:
            return False
        away_s = math.inf if self._unready_since is None else now - self._unready_since
        return self.engine.current is None or away_s >= MOVE_S

    async def ask(self, question: Question[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        return await self.ask_within(CALL_TIMEOUT_S, question, *arguments, **named)

    async def ask_within(self, timeout_s: float, question: Question[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        try:
            return await result(ask(self._coordinator, question, *arguments, **named), timeout_s)
        except (RayActorError, TimeoutError):
            raise NotReadyError("the coordinator does not answer") from None

    async def _watch_readiness(self) -> None:
        answered = False
        self.served_at = time.monotonic()
        while True:
            try:
                self._readiness = await result(ask(self._coordinator, Coordinator.readiness), HANG_S)
                answered = True
            except (RayActorError, TimeoutError) as error:
                if answered and isinstance(error, TimeoutError):
                    # Ray restarts it, and it continues from its saved state; the start may take its time
                    logger.warning("the coordinator hangs; it is ended")
                    kill(self._coordinator, restart=True)
                    answered = False
                # requests need the engine alone
                if self.engine.current is None:
                    self._readiness = Readiness(ready=False, reason="the coordinator does not answer")
            except (RayError, EmoeError) as error:
                logger.exception("asking for readiness failed")
                self._readiness = Readiness(ready=False, reason=f"the coordinator failed: {type(error).__name__}")
            self._give_up_in_vain(time.monotonic())
            await asyncio.sleep(READINESS_S * (4 if self._readiness.ready else 1))

    def _give_up_in_vain(self, now: float) -> None:
        """End every request with an error, if the cluster has not served for `recovery_timeout_s`.

        Without this a client would wait for ever, and learn nothing.
        """
        if self._readiness.ready:
            self.served_at = now
            self._has_served = True
            self._unready_since = None
        elif self._unready_since is None and self._has_served:
            self._unready_since = now
        if now - self.served_at < self._recovery_timeout_s:
            return
        waited = f"{self._recovery_timeout_s:g} s"
        self.engine.end_all(f"the cluster could not serve this request for {waited}: {self._readiness.reason}")

    async def _watch_gcs(self, gcs: GcsWatch) -> None:
        logged = False
        while True:
            await gcs.look(time.monotonic())
            if gcs.lost is not None and not logged:
                logger.error("requests are ended: %s", gcs.lost)
            logged = gcs.lost is not None
            if gcs.lost is not None:
                self.engine.end_all(gcs.lost)
            await asyncio.sleep(LOOK_S)


def task_failed(error: BaseException) -> None:
    """Log what a task in the background of an API replica has raised."""
    logger.error("a task of the API has failed", exc_info=error)
