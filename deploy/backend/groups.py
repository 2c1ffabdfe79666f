"""The groups of a cluster as one Backend.

The router (router.py) gives each request to a group. Questions about one group go to that group, and questions about
what all groups have in common to the first one that answers. Groups come and go at the end of the list, as the
directory (directory.py) says. They start a few at a time: on a machine with few cores, if all started together, none
would serve before the last one does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from ray.exceptions import RayError

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.garbage import keep_collections_short
from elastic_moe.actors.liveness import CALL_TIMEOUT_S
from elastic_moe.actors.loop_watch import LoopWatch
from elastic_moe.actors.remote.background import Background
from elastic_moe.actors.remote.calls import CALL_ERRORS, one_line
from elastic_moe.cluster.errors import NotReadyError, RequestError
from elastic_moe.cluster.lines import counted, expected_engine
from elastic_moe.cluster.messages.views import Readiness
from elastic_moe.deploy.backend.backend import LATER, P, Question, R, Requests
from elastic_moe.deploy.backend.directory import Directory
from elastic_moe.deploy.backend.ray_backend import RayBackend, task_failed
from elastic_moe.deploy.backend.router import Router

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two looks at how many groups there are to be."""

START_S = 60.0
"""Seconds after which the next group may start although one has not become ready: it may wait for a node or a GPU."""

MakeGroup = Callable[[int, Callable[[], None]], RayBackend]


class Groups:
    """Made and used on one event loop. `begin` starts its tasks; `end` stops them."""

    def __init__(self, number: int, make: MakeGroup, directory: Directory | None = None, name: str = "") -> None:
        """`number`: of groups. `make` is given a group's number and what it is to call when it has lost its engine.
        `directory`: None if the groups never change. `name`: by which coordinators know this replica."""
        self._make = make
        self._directory = directory
        self._name = name
        self._changed = asyncio.Event()
        self._changing = asyncio.Lock()
        self._groups = [make(n, self._changed.set) for n in range(number)]
        self._made_at = [time.monotonic()] * number
        """When each group was found or made here."""
        self._wanted = number
        self._router = Router(self._groups, self._changed)
        self.engine: Requests = self._router
        self._watch = Background(task_failed)
        self.loop_watch = LoopWatch("an API replica")

    def begin(self) -> None:
        for group in self._groups:
            group.begin()
        self._watch.start(self.loop_watch.watch())
        self._watch.start(keep_collections_short(lambda: sum(len(group.engine) for group in self._groups)))
        self._router.begin()
        if self._directory is not None:
            self._watch.start(self._follow(self._directory))

    def expect_service(self) -> None:
        """From now on requests may wait for the cluster to serve, although it has not done so yet."""
        for group in self._groups:
            group.expect_service()

    async def end(self) -> None:
        self._watch.cancel()
        await self._watch.settle()
        await self._router.end()
        for group in self._groups:
            await group.end()

    @property
    def num_groups(self) -> int:
        """Those that are retired and have requests here count too."""
        return len(self._groups)

    @property
    def wanted_groups(self) -> int:
        """Those that have not begun to start count too."""
        return self._wanted

    async def resize(self, number: int) -> None:
        if self._directory is None:
            raise NotReadyError("the number of groups cannot be changed here")
        try:
            await asyncio.to_thread(self._directory.want, number)
        except RayError as error:
            raise NotReadyError(f"the number of groups cannot be changed now: {one_line(error)}") from None
        # if this fails, it is tried again and again
        with contextlib.suppress(*CALL_ERRORS):
            await self._go_to(self._directory, number)

    async def _follow(self, directory: Directory) -> None:
        """Add and drop groups as the directory says, again and again. Never returns."""
        while True:
            try:
                number = await asyncio.to_thread(directory.wanted)
                if number != self._wanted or number > len(self._groups):
                    await self._go_to(directory, number)
            except CALL_ERRORS as error:
                logger.warning("the number of groups is not known: %s", one_line(error))
            await self._drop()
            await asyncio.sleep(LOOK_S)

    async def _go_to(self, directory: Directory, number: int) -> None:
        """There are to be so many groups: have as many of the missing ones start as may do so now."""
        async with self._changing:
            if number != self._wanted:
                logger.info("from now on there are %d groups, before %d", number, self._wanted)
                self._wanted = number
                self._router.want(min(number, len(self._groups)))
            if number <= len(self._groups):
                return
            at_once = await asyncio.to_thread(directory.at_once)
            while len(self._groups) < number and await self._starting() < at_once:
                new = len(self._groups)
                await asyncio.to_thread(directory.find, new + 1)
                group = self._make(new, self._changed.set)
                group.begin()
                self._groups.append(group)
                self._made_at.append(time.monotonic())
                self._router.want(len(self._groups))

    async def _starting(self) -> int:
        """Number of groups that have begun to start and are not ready."""
        states = [await group.readiness() for group in self._groups]
        since = time.monotonic() - START_S
        return sum(
            not state.ready and state.error is None and made_at > since
            for state, made_at in zip(states, self._made_at, strict=True)
        )

    async def _drop(self) -> None:
        """Leave the retired groups that have no requests of this replica any more."""
        async with self._changing:
            while len(self._groups) > self._router.wanted and not self._groups[-1].engine.streams:
                group = self._groups.pop()
                self._made_at.pop()
                await group.end()
                with contextlib.suppress(*CALL_ERRORS):
                    await group.ask(Coordinator.check_out, self._name)
                if self._directory is not None:
                    await asyncio.to_thread(self._directory.leave, len(self._groups))

    async def check_out(self, timeout_s: float) -> int:
        """This replica ends: tell all coordinators. Returns how many other replicas there are."""
        calls = [group.ask_within(timeout_s, Coordinator.check_out, self._name) for group in self._groups]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return max((answer for answer in answers if isinstance(answer, int)), default=0)

    def group(self, number: int) -> RayBackend:
        if not 0 <= number < len(self._groups):
            raise RequestError(f"engine: expected {expected_engine(len(self._groups))}, got {number}", param="engine")
        return self._groups[number]

    async def ask(self, question: Question[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        return await self.ask_within(CALL_TIMEOUT_S, question, *arguments, **named)

    async def ask_within(self, timeout_s: float, question: Question[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        *others, last = self._groups
        for group in others:
            try:
                return await group.ask_within(timeout_s, question, *arguments, **named)
            except NotReadyError:
                continue
        return await last.ask_within(timeout_s, question, *arguments, **named)

    async def readiness(self) -> Readiness:
        states = [await group.readiness() for group in self._groups[: self._wanted]]
        return together(states + [LATER] * (self._wanted - len(states)))

    @property
    def can_wait(self) -> bool:
        return any(group.can_wait for group in self._groups)


def together(states: Sequence[Readiness]) -> Readiness:
    """What the groups say, as one answer: the cluster serves if one of them does, and never will if none ever will."""
    if len(states) == 1:
        return states[0]
    ready = [state for state in states if state.ready]
    others = "; ".join(f"group {n}: {state.reason}" for n, state in enumerate(states) if not state.ready)
    if not ready:
        errors = [state.error for state in states if state.error is not None]
        return Readiness(ready=False, reason=others, error=errors[0] if len(errors) == len(states) else None)
    worst = min(ready, key=lambda state: state.resident)
    if len(ready) == len(states):
        return worst
    reason = f"{worst.reason}, with {len(ready)} of {counted(len(states), 'group')}; {others}"
    return Readiness(ready=True, reason=reason, resident=worst.resident)
