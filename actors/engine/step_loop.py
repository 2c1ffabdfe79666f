"""The engine's loop: schedules a step, sends it to all workers, and commits their results. It runs without Ray, so that
tests need none.

The next step is sent shortly before the present one ends, so that no worker waits for the engine. It is not sent
earlier, because a new request has to wait for every step that has been sent.

The epoch may change only while no step is in flight. If a step fails at any worker, the loop rolls it and later steps
back, reports the failure to the coordinator, and waits for the next epoch.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from elastic_moe.actors.engine.clients import Clients
from elastic_moe.actors.engine.step_deadline import StepDeadline
from elastic_moe.actors.engine.worker_links import WorkerLinks
from elastic_moe.actors.liveness import ABORT_S, SILENT_S
from elastic_moe.actors.remote.calls import one_line, within
from elastic_moe.actors.remote.codec import is_exhausted
from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.errors import StepAborted, WorkerError
from elastic_moe.cluster.messages.epochs import STEPS_IN_FLIGHT, Epoch, EpochSpec, WorkerInfo
from elastic_moe.cluster.messages.requests import FinishReason, RequestId, TokenOutput
from elastic_moe.cluster.messages.steps import StepResult
from elastic_moe.cluster.placement import WorkerId

logger = logging.getLogger(__name__)

LEAD = 0.25
"""The next step is sent before the present one ends, by this share of a step's time, but at least `LEAD_S`."""
LEAD_S = 0.004
STOOD_STILL_S = 0.25
"""If the loop continues so many seconds too late, it or its machine was held up, and workers are not blamed."""


@dataclass(slots=True)
class _Flight:
    """A step that has been sent and not committed."""

    workers: Collection[WorkerId]
    tokens: int
    """Tokens of the worker that has the most tokens in this step."""
    results: dict[WorkerId, StepResult] = field(default_factory=dict)
    errors: dict[WorkerId, Exception] = field(default_factory=dict)
    """In place of results."""
    begun: float = 0.0
    """Time at which it became the oldest step in flight."""
    looked_at: float = 0.0
    """Time at which it was last found late; 0 before that."""

    @property
    def pending(self) -> list[WorkerId]:
        return [worker for worker in self.workers if worker not in self.results and worker not in self.errors]

    @property
    def failed(self) -> bool:
        return bool(self.errors)

    @property
    def finished(self) -> bool:
        return len(self.results) == len(self.workers)

    def error(self, worker: WorkerId) -> Exception | None:
        """The error that the worker is to blame for; None if there is none."""
        if worker in self.results:
            return None
        error = self.errors.get(worker, TimeoutError())
        return None if isinstance(error, StepAborted) else error


@dataclass(slots=True)
class _Flip:
    """A request to begin an epoch, which waits for the loop to reach a step boundary."""

    spec: EpochSpec
    infos: dict[WorkerId, WorkerInfo]
    done: asyncio.Future[int]


class StepLoop:
    """All on one event loop, so nothing here needs a lock."""

    def __init__(
        self,
        scheduler: Scheduler,
        clients: Clients,
        *,
        step_timeout_s: float,
        abort: Callable[[Epoch, Iterable[WorkerId]], None],
        report: Callable[[Epoch, Sequence[WorkerId], str], None],
        late: Callable[[Sequence[WorkerId]], None],
    ) -> None:
        """`abort` wakes workers that wait for a dead peer. `report` reports a failed step to the coordinator. `late`
        reports workers that might hang: the coordinator ends those that give no sign of life, and then the step fails.
        """
        self._scheduler = scheduler
        self._clients = clients
        self._step_timeout_s = step_timeout_s
        self._allowed = StepDeadline(step_timeout_s)
        self._abort = abort
        self._report = report
        self._late = late
        self._links = WorkerLinks(self._member_lost)
        self._lost: WorkerId | None = None
        self._spec: EpochSpec | None = None
        self._flip: _Flip | None = None
        self._news = asyncio.Event()
        """Set by the next epoch's coming, and by every answer. Only a step that is given up waits for it."""
        self._broken = False
        """Whether the workers cannot run another step until a new epoch begins."""
        self._step = 0
        self._flights: deque[_Flight] = deque()
        self._took: dict[int, float] = {}
        """Seconds of the last step of each size, by the number of binary digits of its tokens."""
        self._timer: asyncio.TimerHandle | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Make the loop look for work."""
        self._wake.set()

    @property
    def epoch(self) -> Epoch:
        """The epoch in force here, whether it has had a step or not; 0 before the first."""
        return Epoch(0) if self._spec is None else self._spec.epoch

    async def change_epoch(self, spec: EpochSpec, infos: dict[WorkerId, WorkerInfo]) -> int:
        """Flip to a prepared epoch at the next step boundary. Returns how many requests had to leave their worker.

        Raises StepAborted naming the workers that failed.
        """
        if self._flip is not None:
            raise StepAborted(f"epoch {self._flip.spec.epoch} is being committed")
        self._flip = _Flip(spec=spec, infos=infos, done=asyncio.get_running_loop().create_future())
        self._news.set()
        self._wake.set()
        return await self._flip.done

    def lose(self, worker: WorkerId) -> None:
        """The coordinator has given this worker up: from now on nothing that it may still send counts."""
        self._links.cut(worker)

    async def run(self) -> None:
        """Never returns. Raises OSError if this process can open no connection: then it must be replaced."""
        while True:
            self._wake.clear()
            begun = self._now()
            if await self._act():
                # one piece of work at a time, so that the event loop is not held for several
                await asyncio.sleep(0)
                # also if something else has held the loop in this turn
                self._excuse(self._now() - begun)
                continue
            when = self._set_timer()
            await self._wake.wait()
            self._excuse(self._now() - when)

    async def _act(self) -> bool:
        """Do the next piece of work. Returns False if there is none until an event or a timer."""
        oldest = self._flights[0] if self._flights else None
        if oldest is not None and oldest.failed:
            await self._give_up()
        elif oldest is not None and oldest.finished:
            self._commit()
        elif oldest is not None and self._now() >= self._deadline(oldest):
            self._allowed.missed(oldest.tokens)
            await self._give_up()
        elif oldest is not None and self._now() >= self._late_at(oldest):
            oldest.looked_at = self._now()
            self._late(oldest.pending)
        elif oldest is not None and (self._flip is not None or self._now() < self._due(oldest)):
            return False
        elif self._flip is not None:
            await self._commit_epoch(self._flip)
        elif self._broken or self._spec is None:
            return False
        elif self._lost is not None and oldest is None:
            self._break([self._lost], f"{self._lost}: its connection has ended")
        else:
            return self._begin_step(self._spec.epoch)
        return True

    def _excuse(self, stood_still_s: float) -> None:
        """Do not count, for workers, the seconds in which this loop did not read their answers."""
        if stood_still_s < STOOD_STILL_S:
            return
        for flight in self._flights:
            flight.begun += stood_still_s
            flight.looked_at += stood_still_s

    def _now(self) -> float:
        # asking for the running loop is a system call
        if self._event_loop is None:
            self._event_loop = asyncio.get_running_loop()
        return self._event_loop.time()

    def _deadline(self, flight: _Flight) -> float:
        return flight.begun + self._allowed.seconds(flight.tokens)

    def _late_at(self, flight: _Flight) -> float:
        return max(flight.begun, flight.looked_at) + self._allowed.late_s(flight.tokens)

    def _due(self, oldest: _Flight) -> float:
        """Time at which to send the next step, while `oldest` is still in flight."""
        if len(self._flights) >= STEPS_IN_FLIGHT:
            return math.inf
        took = self._took.get(oldest.tokens.bit_length(), 0.0)
        return oldest.begun + took - max(LEAD_S, LEAD * took)

    def _set_timer(self) -> float:
        """Set the timer for the next work. Returns its time; infinity if only an event can bring work."""
        when = math.inf
        if self._timer is not None:
            self._timer.cancel()
        if self._flights:
            due = self._due(self._flights[0])
            late = min(self._deadline(self._flights[0]), self._late_at(self._flights[0]))
            # often enough to measure how long this loop has stood still
            when = min(late, due if due > self._now() else math.inf, self._now() + STOOD_STILL_S)
            self._timer = asyncio.get_running_loop().call_at(when, self._wake.set)
        return when

    def _begin_step(self, epoch: Epoch) -> bool:
        self._step += 1
        plans = self._scheduler.schedule(epoch, self._step)
        if plans is None:
            return False
        tokens = max(next(iter(plans.values())).tokens_per_rank)
        flight = _Flight(workers=tuple(plans), tokens=tokens, begun=self._now())

        def answered(worker: WorkerId, answer: StepResult | Exception) -> None:
            if isinstance(answer, Exception):
                flight.errors[worker] = answer
            else:
                flight.results[worker] = answer
            self._news.set()
            if flight.failed or flight.finished:
                self._wake.set()

        self._links.send(plans, answered)
        self._flights.append(flight)
        self._clients.began(sequence.request_id for plan in plans.values() for sequence in plan.new)
        return True

    def _commit(self) -> None:
        flight, now = self._flights.popleft(), self._now()
        took_s = now - flight.begun
        self._took[flight.tokens.bit_length()] = took_s
        self._allowed.met(flight.tokens, took_s)
        if self._flights:
            self._flights[0].begun = now
        outputs = self._scheduler.commit(flight.results, took_s)
        self._clients.deliver(outputs.single, outputs.tokens)

    # --- Failures -----------------------------------------------------------------------------------------------

    def _member_lost(self, worker: WorkerId) -> None:
        self._lost = worker
        self._wake.set()

    def _break(self, suspects: Sequence[WorkerId], reason: str) -> None:
        assert self._spec is not None
        self._broken = True
        # the coordinator warns, once it knows who is lost
        logger.info("step %d of epoch %d failed: %s", self._step, self._spec.epoch, reason)
        self._report(self._spec.epoch, suspects, reason)

    async def _give_up(self) -> None:
        """A worker failed: free the others, find the suspects, and report to the coordinator."""
        assert self._spec is not None
        self._abort(self._spec.epoch, self._flights[0].workers)
        if silent := await self._hear(SILENT_S):
            self._late(sorted(silent))
            await self._hear(ABORT_S - SILENT_S)
        oldest, *later = self._flights
        self._flights.clear()
        running = self._scheduler.in_oldest_step()
        self._scheduler.rollback()
        broken: WorkerError | None = None
        reasons: list[str] = []
        suspects: list[WorkerId] = []
        for worker in oldest.workers:
            # a worker may have died after it had answered the oldest step
            errors = [
                oldest.error(worker),
                *(e for f in later if not isinstance(e := f.error(worker), WorkerError)),
            ]
            error = next((error for error in errors if error is not None), None)
            if error is None:
                continue
            reasons.append(f"{worker}: {one_line(error)}")
            if isinstance(error, WorkerError):
                broken = broken or error
            else:
                suspects.append(worker)
        if broken is not None and len(running) == 1:
            # the model itself failed on these tokens; to run them again would fail again
            self._fail(running, broken)
        elif broken is not None:
            # any of them may have needed what has failed: an expert runs tokens of all workers
            self._scheduler.run_apart(running)
        self._break(suspects, "; ".join(reasons) or "the workers lost one another")

    async def _hear(self, timeout_s: float) -> set[WorkerId]:
        """Wait until all answers to the steps in flight have come. Returns the workers that are left out then.

        The next epoch's coming says that the coordinator has given workers up: for those nobody waits any longer.
        """
        ends = self._now() + timeout_s
        while True:
            silent = {worker for flight in self._flights for worker in flight.pending}
            flip, left_s = self._flip, ends - self._now()
            if flip is not None:
                silent &= {worker.id for worker in flip.spec.placement.workers}
            if not silent or left_s <= 0:
                return silent
            self._news.clear()
            with suppress(TimeoutError):
                await within(self._news.wait(), left_s)

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
            if request_id in self._clients
        ]
        self._clients.deliver(outputs)
        for output in outputs:
            self._scheduler.abort(output.request_id)

    # --- Epochs -------------------------------------------------------------------------------------------------

    async def _commit_epoch(self, flip: _Flip) -> None:
        """Have every worker begin the epoch, then begin it here. If one fails, only another new epoch helps."""
        members = {worker.id: flip.infos[worker.id] for worker in flip.spec.placement.workers}
        self._lost = None
        failed = await self._links.flip(flip.spec.epoch, members, self._step_timeout_s, first=self._spec is None)
        self._flip = None
        if failed:
            exhausted = next((error for error in failed.values() if is_exhausted(error)), None)
            if exhausted is not None:
                # the workers are not to blame; this process ends and another engine begins
                raise exhausted
            self._broken = True
            detail = "; ".join(f"{worker}: {one_line(error)}" for worker, error in failed.items())
            flip.done.set_exception(StepAborted(f"epoch {flip.spec.epoch} was not committed by {detail}"))
            return
        self._spec, self._broken = flip.spec, False
        moved = self._scheduler.set_workers(
            {worker: info.num_kv_blocks for worker, info in members.items()},
            {worker: info.state_room for worker, info in members.items() if info.state_room is not None},
            {worker: info.window_room for worker, info in members.items() if info.window_room is not None},
        )
        flip.done.set_result(moved)
