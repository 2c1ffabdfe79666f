"""The groups of a cluster as one Backend.

With one group, requests go straight to the client of its engine; with several, router.py chooses. Questions about one
group go to that group, and questions about what all groups have in common to the first one that answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from elastic_moe.actors.liveness import CALL_TIMEOUT_S
from elastic_moe.actors.loop_watch import LoopWatch
from elastic_moe.actors.remote.background import Background
from elastic_moe.cluster.errors import NotReadyError, RequestError
from elastic_moe.cluster.messages.views import Readiness
from elastic_moe.deploy.backend.backend import P, Question, R, Requests
from elastic_moe.deploy.backend.ray_backend import RayBackend, task_failed
from elastic_moe.deploy.backend.router import Router

MakeGroup = Callable[[int, Callable[[], None]], RayBackend]


class Groups:
    """Made and used on one event loop. `begin` starts its tasks; `end` stops them."""

    def __init__(self, number: int, make: MakeGroup) -> None:
        """`number`: of groups. `make` is given a group's number and what it is to call when it has lost its engine."""
        changed = asyncio.Event()
        self._groups = [make(n, changed.set) for n in range(number)]
        self._router = Router(self._groups, changed)
        self.engine: Requests = self._groups[0].engine if number == 1 else self._router
        self._watch = Background(task_failed)

    def begin(self) -> None:
        for group in self._groups:
            group.begin()
        self._watch.start(LoopWatch("an API replica").watch())
        if len(self._groups) > 1:
            self._router.begin()

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
        return len(self._groups)

    def group(self, number: int) -> RayBackend:
        if not 0 <= number < len(self._groups):
            raise RequestError(f"engine: expected 0 to {len(self._groups) - 1}, got {number}", param="engine")
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
        return together([await group.readiness() for group in self._groups])

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
    reason = f"{worst.reason}, with {len(ready)} of {len(states)} groups; {others}"
    return Readiness(ready=True, reason=reason, resident=worst.resident)
