"""The migrator: carries out the copies of one change, spread over the workers, and reports what came of them.

Weights go from source to target by Ray object reference and never pass through here. The target verifies the digest.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic_moe.actors import names
from elastic_moe.actors.liveness import COPY_TIMEOUT_S
from elastic_moe.actors.logs import LogSettings, set_up
from elastic_moe.actors.remote.ask import Remote, ask, forward
from elastic_moe.actors.remote.calls import CALL_ERRORS, one_line, within
from elastic_moe.actors.worker.worker_actor import WorkerActor
from elastic_moe.cluster.facts.transfers import BUNDLE_BYTES, bundles_at_once
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.placement import Move, WorkerId

logger = logging.getLogger(__name__)

Workers = Mapping[WorkerId, Remote[WorkerActor]]

SUPERSEDED_S = 0.1
"""Seconds after which a call that waits for bandwidth notices a newer call."""
LONGEST_REST_S = 0.5
"""Most seconds that two workers rest after a copy. A newer call that needs them waits for the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport:
    done: tuple[Move, ...]
    nbytes: int
    seconds: float
    error: str | None = None
    """The error of the first copy that failed. No copy was begun after it."""


class Migrator:
    """At most one copy per worker at a time, so that none of them is held up for long; disjoint pairs run together.
    While requests run, the two workers of a copy rest after it for as long as it took: steps get their memory. Workers
    on GPUs send bundles of experts, some bundles at a time, and do not rest: a copy takes little of what their steps
    need, and most of it is waiting.

    A newer `copy` supersedes an older one, which stops before its next bundle.
    """

    def __init__(
        self, expert_bytes: int, bytes_per_s: float = 0.0, logs: LogSettings | None = None, on_gpus: bool = False
    ) -> None:
        """bytes_per_s: what all copies together may take while requests run; 0: no limit. on_gpus: the workers are.

        logs: where this process's log lines go; left as it is if not given.
        """
        if logs is not None:
            set_up(names.MIGRATOR, logs)
        self._expert_bytes = expert_bytes
        self._interval_s = 0.0
        self.limit(bytes_per_s)
        self._next_at = 0.0
        """When the next copy may begin."""
        self._generation = 0
        self._rests = not on_gpus
        self._at_once = bundles_at_once(expert_bytes) if on_gpus else 1
        self._bundle = max(1, BUNDLE_BYTES // expert_bytes) if on_gpus else 1
        """Experts that go together."""
        self._busy: Counter[WorkerId] = Counter()
        """Copies that each worker takes part in."""
        self._freed = asyncio.Event()

    def limit(self, bytes_per_s: float) -> None:
        """From now on, all copies together may take this while requests run; 0: no limit."""
        self._interval_s = self._expert_bytes / bytes_per_s if bytes_per_s else 0.0

    async def copy(self, moves: Sequence[Move], workers: Workers, urgent: bool = False) -> MigrationReport:
        """Make every copy. Does not raise where one fails: the report says why, and what was done before.

        urgent: ignore the limit of bandwidth, because nothing is served until the copies are made.
        """
        self._generation += 1
        return await self._run(moves, workers, self._generation, urgent)

    async def ping(self) -> None:
        """Answers as long as the process lives."""

    async def _run(self, moves: Sequence[Move], workers: Workers, generation: int, urgent: bool) -> MigrationReport:
        interval_s = 0.0 if urgent else self._interval_s
        begun = time.monotonic()
        queues: dict[tuple[WorkerId, WorkerId], deque[Move]] = {}
        for move in moves:
            queues.setdefault((move.source, move.target), deque()).append(move)
        running: dict[asyncio.Task[str | None], list[Move]] = {}
        done: list[Move] = []
        failed = False
        error: str | None = None
        while True:
            if error is None and generation != self._generation:
                error = "superseded"
            # one look at the clock: a pause that ended between two would be neither slept through nor made use of
            now = time.monotonic()
            if error is None:
                self._start_free(queues, workers, running, interval_s, now, rest=self._rests and not urgent)
            pause_s = self._next_at - now if interval_s and error is None and any(queues.values()) else 0.0
            if not running:
                if error is not None or not any(queues.values()):
                    break
                if pause_s > 0:
                    await asyncio.sleep(min(pause_s, SUPERSEDED_S))
                    continue
                # an older call's last copy still occupies a worker
                self._freed.clear()
                await self._freed.wait()
                continue
            timeout_s = pause_s if pause_s > 0 else None
            finished, _ = await asyncio.wait(running, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                bundle = running.pop(task)
                reason = task.result()
                if reason is None:
                    done += bundle
                elif not failed:
                    failed, error = True, reason
        return MigrationReport(
            done=tuple(done),
            nbytes=len(done) * self._expert_bytes,
            seconds=time.monotonic() - begun,
            error=error,
        )

    def _start_free(
        self,
        queues: Mapping[tuple[WorkerId, WorkerId], deque[Move]],
        workers: Workers,
        running: dict[asyncio.Task[str | None], list[Move]],
        interval_s: float,
        now: float,
        *,
        rest: bool,
    ) -> None:
        # longest queue first, or the busiest pair would be left for the end
        for (source, target), queue in sorted(queues.items(), key=lambda item: -len(item[1])):
            while queue and max(self._busy[source], self._busy[target]) < self._at_once:
                if interval_s and now < self._next_at:
                    return
                bundle = [queue.popleft() for _ in range(min(self._bundle, len(queue)))]
                if interval_s:
                    self._next_at = now + len(bundle) * interval_s
                self._busy.update((source, target))
                copying = self._copy(bundle, workers[source], workers[target], rest=rest)
                running[asyncio.ensure_future(copying)] = bundle

    async def _copy(
        self, bundle: Sequence[Move], source: Remote[WorkerActor], target: Remote[WorkerActor], *, rest: bool
    ) -> str | None:
        """Copy experts from one worker to another. Returns None, or the reason of the failure."""
        begun, first = time.monotonic(), bundle[0]
        try:
            pairs = [(move.layer, move.expert) for move in bundle]
            copies = ask(source, WorkerActor.export_experts, pairs, first.target)
            await within(forward(target, WorkerActor.import_experts, copies), COPY_TIMEOUT_S)
            if rest:
                await asyncio.sleep(min(time.monotonic() - begun, LONGEST_REST_S))
        except CALL_ERRORS as error:
            others = f" and {counted(len(bundle) - 1, 'other')}" if len(bundle) > 1 else ""
            what = f"layer {first.layer} expert {first.expert}{others} from {first.source} to {first.target}"
            return f"{what}: {one_line(error)}"
        finally:
            self._busy.subtract((first.source, first.target))
            self._freed.set()
        return None
