"""Asks workers and the engine for a sign of life: once a second, and when there is a reason to doubt a worker.

A process that is gone or does not answer in time becomes an event. The polls fetch statistics too. Nothing is decided
here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

from elastic_moe.actors import liveness
from elastic_moe.actors.coordinator.processes import Processes
from elastic_moe.actors.engine.engine import Engine
from elastic_moe.actors.remote.ask import Remote, ask, forward
from elastic_moe.actors.remote.calls import (
    CALL_ERRORS,
    Turns,
    call_all,
    is_death,
    one_line,
    sign_of_life,
    wait_within,
    within,
)
from elastic_moe.actors.remote.links import can_connect
from elastic_moe.actors.worker.worker_actor import WorkerActor
from elastic_moe.cluster.errors import WorkerError
from elastic_moe.cluster.facts.counters import ClusterCounters
from elastic_moe.cluster.facts.events import Event, LoadSeen, WorkerLost
from elastic_moe.cluster.facts.facts import Facts
from elastic_moe.cluster.facts.membership import WorkerRecord
from elastic_moe.cluster.facts.routing import RoutingWindow
from elastic_moe.cluster.messages.epochs import NodeReport
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.messages.views import EngineStatus
from elastic_moe.cluster.placement import WorkerId

logger = logging.getLogger(__name__)

COUNTS_PER_WINDOW = 12
"""Times that nodes' reports are fetched per window. One takes up to 0.4 MB for 58 layers of 256 experts."""

COUNTS_S = 5.0
"""Most seconds between two fetches, so that a change of subject is noticed soon."""
AT_ONCE = 16
"""Workers that are polled in one turn of the loop. The next wait `APART_S` seconds, so that hundreds do not hold it."""
APART_S = 0.01
ENGINE = "engine"


class RollCall:
    """Pings workers when there is a reason to doubt them. A worker that does not answer in time is lost."""

    def __init__(self, processes: Processes, heartbeat_timeout_s: float) -> None:
        self._processes = processes
        self.timeout_s = heartbeat_timeout_s
        self._turns = Turns()

    async def find_lost(self, workers: Iterable[WorkerId], *, stepping: bool = False) -> list[WorkerLost]:
        """The workers that are dead or hang. stepping: the thread that runs the steps has to answer."""
        ping = WorkerActor.ping_step if stepping else WorkerActor.ping
        return await self._call(workers, lambda actor: ask(actor, ping))

    async def find_silent(self, workers: Iterable[WorkerId]) -> list[WorkerLost]:
        """As `find_lost`, with a shorter time-out, for workers that another sign already makes suspect."""

        def ping(actor: Remote[WorkerActor]) -> Awaitable[None]:
            return sign_of_life(lambda: ask(actor, WorkerActor.ping), liveness.SUSPECT_TIMEOUT_S)

        return await self._call(workers, ping)

    async def _call(
        self, workers: Iterable[WorkerId], ping: Callable[[Remote[WorkerActor]], Awaitable[None]]
    ) -> list[WorkerLost]:
        async def call(worker: WorkerId, actor: Remote[WorkerActor]) -> None:
            await self._turns.take()
            await unless_refused(ping(actor), self._processes.doors.get(worker))

        calls = {worker: call(worker, actor) for worker, actor in self._processes.present(workers).items()}
        errors = await call_all(calls, self.timeout_s)
        return [WorkerLost(worker=worker, reason=one_line(error)) for worker, error in errors.items()]


async def unless_refused(answer: Awaitable[None], door: Endpoint | None) -> None:
    """Await the answer of a worker, but no longer where its door refuses connections, which is open for as long as its
    process lives: Ray needs seconds to find that a whole machine is gone. Raises WorkerError then."""
    ping, knock = asyncio.ensure_future(answer), asyncio.ensure_future(_is_refused(door))
    try:
        await asyncio.wait((ping, knock), return_when=asyncio.FIRST_COMPLETED)
        if not ping.done() and await knock:
            # Ray may know more of its end
            await asyncio.wait((ping,), timeout=liveness.RAY_KNOWS_S)
            if not ping.done():
                raise WorkerError("its process died")
        await ping
    finally:
        ping.cancel()
        knock.cancel()


async def _is_refused(door: Endpoint | None) -> bool:
    if door is None:
        return False
    try:
        await can_connect(door)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


class Poller:
    """Polls every worker and the engine, and keeps the engine's last status."""

    def __init__(
        self,
        processes: Processes,
        window: RoutingWindow,
        counters: ClusterCounters,
        *,
        heartbeat_timeout_s: float,
        feed: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        """`window` takes the routing counts, `counters` the tiers' counts and `feed` events. `spawn` runs a poll beside
        the others."""
        self._processes = processes
        self._window = window
        self._counters = counters
        self.timeout_s = heartbeat_timeout_s
        self._feed = feed
        self._spawn = spawn
        self.status = EngineStatus()
        """The engine's last report."""
        self.resident: dict[WorkerId, int] = {}
        """Experts that lay in the device of each worker when it last reported."""
        self.link_gbps: dict[WorkerId, dict[WorkerId, float]] = {}
        """Gigabits per second between each worker and others, as measured when their group formed."""
        self.status_at = 0.0
        """When the last report came."""
        self.shortage: str | None = None
        """What the workers wait for that have no process yet, in words; None if there is room for them."""
        self._load_progress: dict[WorkerId, float] = {}
        self._reported_at: dict[str, float] = {}
        """When each node's report was last asked for."""
        self._asking: set[str] = set()
        self._watched: Remote[Engine] | None = None
        """The engine whose death `_watch_engine` waits for."""

    def poll(self, facts: Facts) -> None:
        """Poll every worker and the engine, except those with a poll under way. Returns at once."""
        processes = self._processes
        idle = [r for r in facts.alive if r.id in processes.workers and r.id not in self._asking]
        for number, record in enumerate(idle):
            self._asking.add(record.id)
            delay_s = number // AT_ONCE * APART_S
            self._spawn(self._poll_worker(record, processes.workers[record.id], delay_s))
        self._look_at_nodes(facts)
        if processes.engine is None or not processes.engine_serves:
            return
        if processes.engine != self._watched:
            self._watched = processes.engine
            self._spawn(self._watch_engine(processes.engine))
        if ENGINE not in self._asking:
            self._asking.add(ENGINE)
            self._spawn(self._poll_engine(processes.engine))

    def forget(self, worker: WorkerId) -> None:
        self._load_progress.pop(worker, None)
        self.resident.pop(worker, None)
        self.link_gbps.pop(worker, None)

    def progress(self, loading: Iterable[WorkerRecord], now: float) -> str:
        """How far these workers have loaded, and what those wait for that have not begun."""
        parts, waiting = [], dict[str, list[WorkerId]]()
        for record in loading:
            waits_for = self.waits_for(record, now)
            if waits_for is not None:
                waiting.setdefault(waits_for, []).append(record.id)
            elif record.id in self._load_progress:
                parts.append(f"{record.id} {self._load_progress[record.id]:.0%}")
            else:
                parts.append(f"{record.id} starting its process")
        clauses = [f"loading: {', '.join(parts)}"] if parts else []
        return "; ".join([*clauses, *(wait_clause(workers, what) for what, workers in waiting.items())])

    def waits(self, facts: Facts, now: float) -> list[WorkerId]:
        """The workers whose processes have not started, although there was time for that."""
        return [
            record.id
            for record in facts.alive
            if not record.loaded
            and record.id not in self._load_progress
            and now - record.asked_at > liveness.STARTING_S
        ]

    def waits_for(self, record: WorkerRecord, now: float) -> str | None:
        """What the worker's process waits for before it can start, in words; None if it waits for nothing."""
        if record.loaded or not record.alive or record.id in self._load_progress:
            return None
        waited_s = now - record.asked_at
        if self.shortage is not None and waited_s > liveness.STARTING_S:
            return self.shortage
        return "resources" if waited_s > liveness.WAITING_FOR_RESOURCES_S else None

    def waited_s(self, facts: Facts, now: float) -> float:
        """For how long a worker has waited for resources; 0 if none does."""
        waiting = [record for record in facts.alive if self.waits_for(record, now) is not None]
        return max((now - record.asked_at for record in waiting), default=0.0)

    async def refresh_status(self) -> None:
        """Refresh the engine's status now; keep the last one if the engine does not answer within POLL_S."""
        engine = self._processes.engine
        if engine is not None:
            with contextlib.suppress(*CALL_ERRORS):
                self._seen(await within(ask(engine, Engine.status), liveness.POLL_S))

    async def refresh_counts(self, facts: Facts, older_s: float = 0.0) -> None:
        """Have every node's counts in the window now, if the last ones are `older_s` old; those that do not come within
        POLL_S come later."""
        # whoever asks may give up, and a report must not: what it tells, no later one does
        reports = [self._spawn(self._fetch_report(n, actors, 0.0)) for n, actors in self._due(facts, older_s).items()]
        if reports:
            await wait_within(reports, liveness.POLL_S)

    async def _poll_worker(self, record: WorkerRecord, actor: Remote[WorkerActor], delay_s: float) -> None:
        try:
            if delay_s:
                await asyncio.sleep(delay_s)
            if record.loaded:
                await sign_of_life(lambda: ask(actor, WorkerActor.ping), self.timeout_s)
            elif record.id in self._load_progress:
                patience_s = liveness.LOADING_PATIENCE * self.timeout_s
                self._load_progress[record.id] = await sign_of_life(
                    lambda: ask(actor, WorkerActor.load_progress), patience_s
                )
            else:
                # without a time-out: the process may have to wait for resources
                self._load_progress[record.id] = await ask(actor, WorkerActor.load_progress)
        except CALL_ERRORS as error:
            if is_death(error) or isinstance(error, TimeoutError):
                self._feed(WorkerLost(worker=record.id, reason=one_line(error)))
            else:
                logger.warning("worker %s: %s", record.id, one_line(error))
        finally:
            self._asking.discard(record.id)

    def _look_at_nodes(self, facts: Facts) -> None:
        """Ask each node for its workers' report where it is due."""
        every_s = min(self._window.window_s / COUNTS_PER_WINDOW, COUNTS_S)
        for number, (node, actors) in enumerate(self._due(facts, every_s).items()):
            self._spawn(self._fetch_report(node, actors, number * APART_S))

    def _due(self, facts: Facts, older_s: float) -> dict[str, list[Remote[WorkerActor]]]:
        """The loaded workers of each node whose report is `older_s` old. They count as asked now."""
        nodes: dict[str, list[Remote[WorkerActor]]] = {}
        for record in facts.loaded:
            actor = self._processes.workers.get(record.id)
            if actor is not None and record.info is not None:
                nodes.setdefault(record.info.node, []).append(actor)
        now = time.monotonic()
        due = {node: actors for node, actors in nodes.items() if now - self._reported_at.get(node, 0.0) >= older_s}
        self._reported_at = {node: now if node in due else self._reported_at[node] for node in nodes}
        return due

    async def _fetch_report(self, node: str, actors: Sequence[Remote[WorkerActor]], delay_s: float) -> None:
        try:
            await asyncio.sleep(delay_s)
            first, *others = actors
            # each worker's goes straight to the next one of its node, which adds its own
            answer: Awaitable[NodeReport] = ask(first, WorkerActor.report)
            for other in others:
                answer = forward(other, WorkerActor.report, answer)
            report = await within(answer, self.timeout_s)
        except CALL_ERRORS as error:
            # a worker that died or hangs is found by the polls of workers
            logger.info("the report of node %s did not come: %s", node, one_line(error))
            return
        self._window.add(report.counts, time.monotonic())
        self.link_gbps.update(report.link_gbps)
        for worker, tiers in report.tiers.items():
            self._counters.add_tiers(tiers)
            self.resident[worker] = tiers.resident

    async def _poll_engine(self, engine: Remote[Engine]) -> None:
        try:
            self._seen(await sign_of_life(lambda: ask(engine, Engine.status), self.timeout_s))
            self._feed(load_seen(self.status))
        except CALL_ERRORS as error:
            self._engine_lost(engine, error)
        finally:
            self._asking.discard(ENGINE)

    def _seen(self, status: EngineStatus) -> None:
        self.status, self.status_at = status, time.monotonic()

    async def _watch_engine(self, engine: Remote[Engine]) -> None:
        """Notice the engine's death at once instead of at the next poll."""
        try:
            await ask(engine, Engine.stay)
        except CALL_ERRORS as error:
            self._engine_lost(engine, error)

    def _engine_lost(self, engine: Remote[Engine], error: BaseException) -> None:
        event = self._processes.drop_engine(engine, one_line(error))
        if event is not None:
            self._feed(event)


def wait_clause(workers: Sequence[WorkerId], what: str) -> str:
    return f"{', '.join(workers)} {'waits' if len(workers) == 1 else 'wait'} for {what}"


def load_seen(status: EngineStatus) -> LoadSeen:
    usage = status.kv_usage.values()
    return LoadSeen(
        waiting=status.waiting,
        running=sum(status.running.values()),
        kv_usage=sum(usage) / len(usage) if usage else 0.0,
        busy=tuple(worker for worker, running in status.running.items() if running),
    )
