"""Gives requests to the engines of several groups, and has them go on in another group if theirs is lost.

    generate() -> routing.choose() -> the client of a group's engine -> (the group is lost) -> the client of another one

A request moves with the tokens that it has, as it goes on with the next engine of one group (engine_client.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence

from elastic_moe.actors.remote.background import Background
from elastic_moe.cluster.errors import NotReadyError
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, TokenOutput
from elastic_moe.deploy.backend.ray_backend import RayBackend, task_failed
from elastic_moe.deploy.backend.request_stream import RequestStream, TakesTokens
from elastic_moe.deploy.backend.routing import (
    GroupState,
    KnownPrefixes,
    Loads,
    Report,
    by_name,
    choose,
    chunk_keys,
)

logger = logging.getLogger(__name__)

LOOK_S = 0.25
"""Seconds between two looks for groups that are lost, if no engine says so by its end."""
LOAD_S = 1.0
"""Seconds between two questions to each engine about the requests of all replicas."""


class Router:
    """On one event loop."""

    def __init__(self, groups: Sequence[RayBackend], changed: asyncio.Event) -> None:
        """`groups` may become longer and shorter at its end. `changed` is set when a group has lost its engine."""
        self._groups = groups
        self._changed = changed
        self.wanted = len(groups)
        """Number of groups that take requests. Those after them are retired: their requests move away."""
        self._loads = Loads()
        self._asked: set[int] = set()
        """Groups whose engines have been asked for their load and have not answered."""
        self._prefixes = KnownPrefixes(len(groups))
        self._background = Background(task_failed)

    def begin(self) -> None:
        for work in (self._watch(), self._watch_loads()):
            self._background.start(work)

    def want(self, number: int) -> None:
        """From now on the first `number` groups take requests."""
        self.wanted = number
        self._changed.set()

    async def end(self) -> None:
        self._background.cancel()
        await self._background.settle()

    # --- Requests -----------------------------------------------------------------------------------------------

    async def generate(
        self, request: GenerateRequest, shortcut: TakesTokens | None = None
    ) -> AsyncGenerator[TokenOutput, None]:
        stream = RequestStream(request, shortcut)
        self._groups[self._place(stream)].engine.take(stream)
        ended = False
        try:
            await self._groups[stream.group].engine.submit(stream)
            while not ended:
                output = await stream.next()
                ended = output.finish_reason is not None
                yield output
        finally:
            # by now it may be another group than at the beginning
            self._give_up(stream, ended=ended)
            self._learn(stream)

    def _place(self, stream: RequestStream) -> int:
        """The group for a request. While no group serves, the one that served last."""
        if len(self._groups) == 1:
            return 0
        states = self.states()
        request = stream.request
        if request.lasting:
            best = by_name(states, request.request_id).value
        else:
            self._prefixes.groups = len(states)
            known = self._prefixes.known(chunk_keys(request.prompt_token_ids, request.cache_salt))
            best = choose(states, known, request.request_id).value
        if best is None:
            numbers = range(min(self.wanted, len(self._groups)))
            return max(numbers, key=lambda number: self._groups[number].served_at)
        stream.group = best
        self._loads.placed(best, request.request_id)
        self._learn(stream)
        return best

    def _give_up(self, stream: RequestStream, *, ended: bool) -> None:
        self._groups[stream.group].engine.give_up(stream, ended=ended)
        self._loads.left(stream.group, stream.request.request_id)

    def _learn(self, stream: RequestStream) -> None:
        """The group of this request has its tokens so far in its prefix caches, or will have them soon."""
        if len(self._groups) == 1:
            return
        self._prefixes.groups = len(self._groups)
        tokens = (*stream.request.prompt_token_ids, *stream.received)
        self._prefixes.learn(chunk_keys(tokens, stream.request.cache_salt), stream.group)

    def states(self) -> list[GroupState]:
        """What is known here of each group now."""
        return [
            self._loads.state(number, len(group.engine), serves=group.serves and number < self.wanted)
            for number, group in enumerate(self._groups)
        ]

    def cancel(self, request_id: RequestId) -> None:
        next((g for g in self._groups if request_id in g.engine), self._groups[0]).engine.cancel(request_id)

    async def orphans(self, request_ids: Sequence[RequestId]) -> tuple[RequestId, ...]:
        """Those that no group has under a replica that lives. A group without an engine has none."""
        asked = [group for group in self._groups if group.engine.current is not None]
        answers = await asyncio.gather(*(group.engine.orphans(request_ids) for group in asked))
        return tuple(name for name in request_ids if answers and all(name in answer for answer in answers))

    def forget(self, request_id: RequestId) -> None:
        for group in self._groups:
            group.engine.forget(request_id)

    def group_of(self, request_id: RequestId) -> int:
        return next((number for number, group in enumerate(self._groups) if request_id in group.engine), 0)

    @property
    def resumed(self) -> int:
        return sum(group.engine.resumed for group in self._groups)

    # --- Groups that are lost or retired ------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Move requests away from groups that are lost or retired. Never returns."""
        lost: set[int] = set()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._changed.wait()
            self._changed.clear()
            now = time.monotonic()
            before, lost = lost, {n for n, g in enumerate(self._groups) if n >= self.wanted or g.is_lost(now)}
            for number in lost - before:
                self._prefixes.forget(number)
                self._loads.forget(number)
            for number in lost:
                self._move_requests(number)

    def _move_requests(self, lost: int) -> None:
        """Have the requests of a lost or retired group go on in others, if one serves."""
        streams = self._groups[lost].engine.streams
        if not streams or not any(state.serves for state in self.states()):
            return
        what = "lost" if lost < self.wanted else "retired"
        logger.warning(
            "group %d is %s: %s in other groups",
            lost,
            what,
            "1 request goes on" if len(streams) == 1 else f"{len(streams)} requests go on",
        )
        for stream in streams:
            self._give_up(stream, ended=False)
            self._groups[self._place(stream)].engine.take_over(stream)

    async def _watch_loads(self) -> None:
        """Ask the groups' engines for the requests of all replicas, again and again. Never returns."""
        while True:
            for number, group in enumerate(self._groups if len(self._groups) > 1 else ()):
                # each by itself: an engine that hangs keeps nobody's answer waiting
                if number not in self._asked:
                    self._background.start(self._ask_load(number, group))
            await asyncio.sleep(LOAD_S)

    async def _ask_load(self, number: int, group: RayBackend) -> None:
        self._asked.add(number)
        try:
            before, counted = len(group.engine), self._loads.asked(number)
            status = await group.engine.status()
        except NotReadyError:
            return
        finally:
            self._asked.discard(number)
        # those of this replica that have ended meanwhile are nobody else's
        others = max(0, status.num_requests - max(before, len(group.engine)))
        report = Report(others=others, workers=len(status.running) or 1, replicas=max(1, status.replicas))
        self._loads.told(number, report, counted)
