"""Engine: the queue of requests and the lock-step step loop.

A step is schedule, run, postprocess. Between two steps, and only there, the epoch may change. A step that fails
anywhere counts for nothing: it is rolled back, the coordinator is told, and the loop waits for the next epoch.
Outputs leave through `poll`, one call for all of a client's requests, so that no Ray call is made per token.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayActorError

from actors.batching import Scheduler
from actors.calls import one_line
from cluster.config import ServeConfig
from cluster.errors import NotReadyError, RequestError, StepAborted
from cluster.placement import WorkerId
from cluster.protocol import (
    EngineStatus,
    EpochSpec,
    FinishReason,
    GenerateRequest,
    HostInfo,
    ModelInfo,
    RequestId,
    StepPlan,
    StepResult,
    TokenOutput,
)

log = logging.getLogger(__name__)

POLL_S = 10.0
"""Longest that `poll` waits for something to tell."""
CLIENT_S = 60.0
"""A client that has not polled for so long is gone, and its requests are aborted."""
_ABORT_S = 5.0
"""How long hosts get to give up a step, once one of them has failed."""

Hosts = dict[WorkerId, Any]
"""Ray handles by worker; Any, because Ray's handles are untyped."""


@dataclass(slots=True)
class _Client:
    """What an API replica has not fetched yet."""

    outputs: list[TokenOutput] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    polled_at: float = 0.0


@dataclass(slots=True)
class _Flip:
    """An epoch that is asked for, until the loop reaches a step boundary."""

    spec: EpochSpec
    hosts: Hosts
    infos: dict[WorkerId, HostInfo]
    done: asyncio.Future[None]


class Engine:
    """An async actor: everything runs on its event loop, so nothing here needs a lock."""

    def __init__(self, config: ServeConfig, coordinator: Any) -> None:
        self._config = config
        self._coordinator = coordinator
        self._scheduler: Scheduler | None = None
        self._spec: EpochSpec | None = None
        self._hosts: Hosts = {}
        self._flip: _Flip | None = None
        self._broken = False
        """The group cannot run a step; only a new epoch helps."""
        self._step = 0
        self._wake = asyncio.Event()
        self._clients: dict[str, _Client] = {}
        self._owners: dict[RequestId, str] = {}
        self._tasks: list[asyncio.Task[None]] = []

    # --- Called by the coordinator ------------------------------------------------------------------------------

    async def start(self, model: ModelInfo, spec: EpochSpec, hosts: Hosts, infos: dict[WorkerId, HostInfo]) -> None:
        """Begin to serve with the first epoch. Raises StepAborted, naming the workers, where a host did not commit."""
        config = self._config
        self._scheduler = Scheduler(
            {},
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=min(model.max_model_len, config.max_model_len or model.max_model_len),
            eos_token_ids=model.eos_token_ids,
        )
        self._tasks = [asyncio.create_task(self._loop()), asyncio.create_task(self._forget_clients())]
        for task in self._tasks:
            task.add_done_callback(_die_of)
        for host in hosts.values():
            # hosts run their calls in order, so this is done before the commit
            host.forget_sequences.remote()
        await self.change_epoch(spec, hosts, infos)

    async def change_epoch(self, spec: EpochSpec, hosts: Hosts, infos: dict[WorkerId, HostInfo]) -> None:
        """Flip to a prepared epoch at the next step boundary. Raises StepAborted naming the workers that failed."""
        if self._flip is not None:
            raise StepAborted(f"epoch {self._flip.spec.epoch} is being committed")
        self._flip = _Flip(spec=spec, hosts=hosts, infos=infos, done=asyncio.get_running_loop().create_future())
        self._wake.set()
        await self._flip.done

    async def status(self) -> EngineStatus:
        return EngineStatus() if self._scheduler is None else self._scheduler.status()

    # --- Called by API replicas ---------------------------------------------------------------------------------

    async def submit(self, client_id: str, requests: Sequence[GenerateRequest]) -> None:
        """Accept requests, all or none; one that is already running is left alone. Raises RequestError."""
        if self._scheduler is None:
            raise NotReadyError("the engine has not been started")
        client = self._client(client_id)
        accepted: list[RequestId] = []
        for request in requests:
            if request.request_id in self._owners:
                continue
            try:
                ended = self._scheduler.add(request)
            except RequestError:
                for request_id in accepted:
                    self._forget(request_id)
                raise
            if ended is not None:
                client.outputs.append(ended)
                client.news.set()
            else:
                self._owners[request.request_id] = client_id
                accepted.append(request.request_id)
        self._wake.set()

    async def abort(self, client_id: str, request_ids: Sequence[RequestId]) -> None:
        """Forget requests. Those that have ended, or are not the client's, are passed over."""
        for request_id in request_ids:
            if self._owners.get(request_id) == client_id:
                self._forget(request_id)

    async def poll(self, client_id: str) -> list[TokenOutput]:
        """What is new for the client's requests: at once if there is something, else as soon as there is, else []."""
        client = self._client(client_id)
        if not client.outputs:
            client.news.clear()
            try:
                await asyncio.wait_for(client.news.wait(), POLL_S)
            except TimeoutError:
                return []
        outputs, client.outputs = client.outputs, []
        return outputs

    def _client(self, client_id: str) -> _Client:
        client = self._clients.setdefault(client_id, _Client())
        client.polled_at = time.monotonic()
        return client

    def _forget(self, request_id: RequestId) -> None:
        assert self._scheduler is not None
        self._scheduler.abort(request_id)
        self._owners.pop(request_id, None)

    async def _forget_clients(self) -> None:
        """Abort the requests of API replicas that are gone."""
        while True:
            await asyncio.sleep(CLIENT_S / 4)
            now = time.monotonic()
            for client_id in [c for c, client in self._clients.items() if now - client.polled_at > CLIENT_S]:
                del self._clients[client_id]
                lost = [r for r, owner in self._owners.items() if owner == client_id]
                for request_id in lost:
                    self._forget(request_id)
                if lost:
                    log.warning("aborted %d requests of an API replica that is gone", len(lost))

    # --- The loop -----------------------------------------------------------------------------------------------

    async def _loop(self) -> None:
        assert self._scheduler is not None
        while True:
            if self._flip is not None:
                await self._commit_epoch(self._flip)
            plans = None
            if not self._broken and self._spec is not None:
                self._step += 1
                plans = self._scheduler.schedule(self._spec.epoch, self._step)
            if plans is None:
                self._wake.clear()
                if self._flip is None:
                    await self._wake.wait()
                continue
            results = await self._run(plans)
            if results is None:
                self._scheduler.rollback()
            else:
                self._deliver(self._scheduler.commit(results))

    async def _run(self, plans: dict[WorkerId, StepPlan]) -> dict[WorkerId, StepResult] | None:
        """One lock-step step on all hosts; None where it failed, in which case the group is broken."""
        tasks = {worker: asyncio.ensure_future(self._hosts[worker].step.remote(plan)) for worker, plan in plans.items()}
        # hosts give a silent peer up after step_timeout; what has not come back by then hangs itself
        done, pending = await asyncio.wait(
            tasks.values(), timeout=self._config.step_timeout + _ABORT_S, return_when=asyncio.FIRST_EXCEPTION
        )
        if not pending and all(task.exception() is None for task in done):
            return {worker: task.result() for worker, task in tasks.items()}
        self._broken = True
        await self._give_up(tasks, plans)
        return None

    async def _give_up(
        self, tasks: dict[WorkerId, asyncio.Future[StepResult]], plans: dict[WorkerId, StepPlan]
    ) -> None:
        """A host failed: free the others, find out who it was, and tell the coordinator."""
        assert self._spec is not None
        for worker, task in tasks.items():
            if not task.done():
                self._hosts[worker].abort_step.remote()
        await asyncio.wait(tasks.values(), timeout=_ABORT_S)
        suspects: list[WorkerId] = []
        reasons: list[str] = []
        for worker, task in tasks.items():
            error = task.exception() if task.done() else TimeoutError("no answer")
            if error is None or isinstance(error, StepAborted):
                continue
            reasons.append(f"{worker}: {one_line(error)}")
            if isinstance(error, RayActorError | TimeoutError):
                suspects.append(worker)
            else:
                # the model itself failed on these tokens; to run them again would fail again
                self._fail([chunk.request_id for chunk in plans[worker].chunks], error)
        reason = "; ".join(reasons) or "the workers lost one another"
        log.warning("step %d of epoch %d failed: %s", self._step, self._spec.epoch, reason)
        self._coordinator.report_step_failure.remote(self._spec.epoch, suspects, reason)

    def _fail(self, request_ids: Sequence[RequestId], error: BaseException) -> None:
        outputs = [
            TokenOutput(
                request_id=request_id,
                offset=0,
                token_ids=(),
                finish_reason=FinishReason.ERROR,
                error=f"the model failed on this request: {one_line(error)}",
            )
            for request_id in request_ids
            if request_id in self._owners
        ]
        self._deliver(outputs)
        assert self._scheduler is not None
        for output in outputs:
            self._scheduler.abort(output.request_id)

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        for output in outputs:
            owner = self._owners.get(output.request_id)
            client = self._clients.get(owner) if owner is not None else None
            if output.finish_reason is not None:
                self._owners.pop(output.request_id, None)
            if client is not None:
                client.outputs.append(output)
                client.news.set()

    async def _commit_epoch(self, flip: _Flip) -> None:
        """Every host flips, then this does. Where one cannot, the group is broken: some may have, others not."""
        assert self._scheduler is not None
        members = [worker.id for worker in flip.spec.placement.workers]
        answers = await asyncio.gather(
            *(
                asyncio.wait_for(flip.hosts[w].commit.remote(flip.spec.epoch), self._config.step_timeout)
                for w in members
            ),
            return_exceptions=True,
        )
        failed = {w: a for w, a in zip(members, answers, strict=True) if isinstance(a, BaseException)}
        self._flip = None
        if failed:
            self._broken = True
            detail = "; ".join(f"{worker}: {one_line(error)}" for worker, error in failed.items())
            flip.done.set_exception(StepAborted(f"epoch {flip.spec.epoch} was not committed by {detail}"))
            return
        self._spec, self._hosts, self._broken = flip.spec, {w: flip.hosts[w] for w in members}, False
        self._scheduler.set_workers({w: flip.infos[w].num_kv_blocks for w in members})
        flip.done.set_result(None)


def _die_of(task: asyncio.Task[None]) -> None:
    """An engine whose loop has ended would hang every request; one that dies is replaced, and they are sent again."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the step loop failed", exc_info=error)
        os._exit(1)
