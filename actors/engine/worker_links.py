"""The engine's connections to the workers of the epoch in force."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import NoReturn

from elastic_moe.actors.remote.calls import within
from elastic_moe.actors.remote.codec import Message, WireError, encode
from elastic_moe.actors.remote.links import Link, connect
from elastic_moe.cluster.messages.epochs import Epoch, WorkerInfo
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.messages.steps import CommitEpoch, ForgetSequences, StepPlan, StepResult
from elastic_moe.cluster.placement import WorkerId

Answered = Callable[[WorkerId, StepResult | Exception], None]
"""Takes a worker's result; the exception is StepAborted, WorkerError or ConnectionError."""


class WorkerLinks:
    """One link per worker. A worker answers messages in the order in which they are sent; none is sent twice."""

    def __init__(self, lost: Callable[[WorkerId], None]) -> None:
        """`lost` is called at once when a worker's connection ends, because its process is then gone."""
        self._lost = lost
        self._links: dict[WorkerId, tuple[Endpoint, Link]] = {}

    async def flip(
        self, epoch: Epoch, infos: Mapping[WorkerId, WorkerInfo], timeout_s: float, *, first: bool
    ) -> dict[WorkerId, BaseException]:
        """Connect to exactly the workers in `infos`, and have each commit `epoch`. Returns the errors by worker.

        `first`: the engine has just begun, so the workers must forget the requests of an earlier engine.
        """
        for worker in self._links.keys() - infos.keys():
            self._links.pop(worker)[1].close()
        answers = await asyncio.gather(
            *(within(self._commit(info, epoch, first), timeout_s) for info in infos.values()),
            return_exceptions=True,
        )
        return {w: a for w, a in zip(infos, answers, strict=True) if isinstance(a, BaseException)}

    async def _commit(self, info: WorkerInfo, epoch: Epoch, first: bool) -> None:
        link = await self._link(info)
        if first:
            await link.call(ForgetSequences())
        await link.call(CommitEpoch(epoch=epoch))

    async def _link(self, info: WorkerInfo) -> Link:
        endpoint, link = self._links.get(info.worker, (None, None))
        if link is None or link.closed or endpoint != info.endpoint:
            if link is not None:
                del self._links[info.worker]
                link.close()
            link = await connect(info.endpoint, _unexpected, self._ended)
            self._links[info.worker] = (info.endpoint, link)
        return link

    def send(self, plans: Mapping[WorkerId, StepPlan], answered: Answered) -> None:
        """Send each worker its plan. `answered` is called once for each worker, perhaps before this returns."""
        # workers that just go on have the same plan
        frames = {id(plan): encode(plan) for plan in {id(plan): plan for plan in plans.values()}.values()}
        for worker, plan in plans.items():
            self._links[worker][1].ask(frames[id(plan)], partial(answered, worker))

    def cut(self, worker: WorkerId) -> None:
        """End the connection to a worker, if there is one. It counts as ended by the worker."""
        if worker in self._links:
            self._links[worker][1].close()

    def _ended(self, link: Link) -> None:
        for worker, (_, known) in self._links.items():
            if known is link:
                self._lost(worker)


def _unexpected(link: Link, message: Message) -> NoReturn:
    raise WireError(f"expected only answers from a worker, got a {type(message).__name__}")
