"""The migrator: carries out the copies of one change, spread over the workers, and reports what came of them.

Weights go from source to target by Ray object reference and never pass through here. The target verifies the digest.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.calls import CALL_ERRORS, one_line
from cluster.placement import Move, WorkerId

logger = logging.getLogger(__name__)

COPY_TIMEOUT_S = 60.0
"""For one expert. A host that takes longer hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport:
    done: tuple[Move, ...]
    nbytes: int
    seconds: float
    failed: Move | None = None
    """The first copy that failed; no further ones were begun."""
    error: str | None = None


class Migrator:
    """At most one copy per worker at a time, so that none of them is held up for long; disjoint pairs run together.

    A newer `copy` supersedes an older one, which stops before its next expert.
    """

    def __init__(self, expert_bytes: int) -> None:
        self._expert_bytes = expert_bytes
        self._generation = 0
        self._busy: set[WorkerId] = set()
        self._freed = asyncio.Event()

    async def copy(self, moves: Sequence[Move], hosts: Mapping[WorkerId, Any]) -> MigrationReport:
        """Make every copy. Does not raise where one fails: the report says which, and what was done before."""
        self._generation += 1
        return await self._run(moves, hosts, self._generation)

    async def _run(self, moves: Sequence[Move], hosts: Mapping[WorkerId, Any], generation: int) -> MigrationReport:
        begun = time.monotonic()
        queues: dict[tuple[WorkerId, WorkerId], deque[Move]] = {}
        for move in moves:
            queues.setdefault((move.source, move.target), deque()).append(move)
        running: dict[asyncio.Task[str | None], Move] = {}
        done: list[Move] = []
        failed: Move | None = None
        error: str | None = None
        while True:
            if error is None and generation != self._generation:
                error = "superseded"
            if error is None:
                self._start_free(queues, hosts, running)
            if not running:
                if error is not None or not any(queues.values()):
                    break
                # an older call's last copy still occupies a worker
                self._freed.clear()
                await self._freed.wait()
                continue
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                move = running.pop(task)
                reason = task.result()
                if reason is None:
                    done.append(move)
                elif failed is None:
                    failed, error = move, reason
        return MigrationReport(
            done=tuple(done),
            nbytes=len(done) * self._expert_bytes,
            seconds=time.monotonic() - begun,
            failed=failed,
            error=error,
        )

    def _start_free(
        self,
        queues: Mapping[tuple[WorkerId, WorkerId], deque[Move]],
        hosts: Mapping[WorkerId, Any],
        running: dict[asyncio.Task[str | None], Move],
    ) -> None:
        # longest queue first, or the busiest pair would be left for the end
        for (source, target), queue in sorted(queues.items(), key=lambda item: -len(item[1])):
            if queue and not self._busy & {source, target}:
                move = queue.popleft()
                self._busy |= {source, target}
                running[asyncio.ensure_future(self._copy_one(move, hosts[source], hosts[target]))] = move

    async def _copy_one(self, move: Move, source: Any, target: Any) -> str | None:
        """None, or why it failed."""
        try:
            copy = source.export_expert.remote(move.layer, move.expert)
            await asyncio.wait_for(target.import_expert.remote(copy), COPY_TIMEOUT_S)
        except CALL_ERRORS as error:
            return f"layer {move.layer} expert {move.expert} from {move.source} to {move.target}: {one_line(error)}"
        finally:
            self._busy -= {move.source, move.target}
            self._freed.set()
        return None
