"""Brings experts to the workers that need them: the migrator copies some, and workers read others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from elastic_moe.actors import liveness
from elastic_moe.actors.coordinator.migrator import MigrationReport, Migrator
from elastic_moe.actors.coordinator.processes import Processes
from elastic_moe.actors.remote.ask import Remote, ask
from elastic_moe.actors.remote.calls import CALL_ERRORS, one_line, within
from elastic_moe.actors.worker.worker_actor import WorkerActor
from elastic_moe.cluster.facts.events import ExpertKey, Transfer
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.placement import WorkerId

logger = logging.getLogger(__name__)

READ_AT_ONCE = 16
"""Experts that a worker reads in one call. A newer change takes effect between two calls."""


class Transferring:
    """Runs one transfer at a time. A later transfer supersedes an earlier one, which stops before its next expert."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._epoch: Epoch | None = None

    def supersede(self, epoch: Epoch) -> None:
        """From now on, read only what `epoch` needs."""
        self._epoch = epoch

    async def bring(self, command: Transfer) -> tuple[MigrationReport, list[ExpertKey], list[str]]:
        """Copy and read side by side. Returns the report of the copies, the experts read, and all errors."""
        report, (read, failed) = await asyncio.gather(self._copy(command), self._read(command))
        return report, read, [error for error in (report.error, failed) if error is not None]

    async def _copy(self, command: Transfer) -> MigrationReport:
        if not command.copies:
            return _none()
        migrator = self._processes.ensure_migrator()
        wanted = {move.source for move in command.copies} | {move.target for move in command.copies}
        workers = self._processes.present(wanted)
        if len(workers) < len(wanted):
            return _none("a worker is gone")
        copying = asyncio.ensure_future(ask(migrator, Migrator.copy, command.copies, workers, command.urgent))
        try:
            await self._watch(migrator, copying)
            report = copying.result()
        except CALL_ERRORS as error:
            return _none(f"the migrator failed: {one_line(error)}")
        rate = report.nbytes / max(report.seconds, 1e-9) / 1e6
        logger.info("epoch %d: %s copied in %.2f s (%.0f MB/s)", command.epoch, counted(len(report.done), "expert"),
                    report.seconds, rate)  # fmt: skip
        return report

    async def _watch(self, migrator: Remote[Migrator], copying: asyncio.Future[MigrationReport]) -> None:
        """Wait until the copies are made, however long it takes. Ends a hanging migrator; raises TimeoutError."""
        while not copying.done():
            await asyncio.wait([copying], timeout=liveness.PROBE_TIMEOUT_S)
            if copying.done():
                return
            try:
                await within(ask(migrator, Migrator.ping), liveness.PROBE_TIMEOUT_S)
            except TimeoutError:
                copying.cancel()
                self._processes.drop_migrator(migrator)
                raise

    async def _read(self, command: Transfer) -> tuple[list[ExpertKey], str | None]:
        """Returns the experts that were read, and the first error. Workers read side by side."""
        done: list[ExpertKey] = []
        errors: list[str] = []

        async def read_all(worker: WorkerId, keys: Sequence[ExpertKey]) -> None:
            for begin in range(0, len(keys), READ_AT_ONCE):
                if errors or self._epoch != command.epoch:
                    return
                part = keys[begin : begin + READ_AT_ONCE]
                pairs = [(layer, expert) for _, layer, expert in part]
                try:
                    await ask(self._processes.workers[worker], WorkerActor.read_experts, pairs)
                except KeyError:
                    errors.append(f"worker {worker} is gone")
                except CALL_ERRORS as error:
                    errors.append(f"worker {worker} could not read {counted(len(part), 'expert')}: {one_line(error)}")
                else:
                    done.extend(part)

        wanted: dict[WorkerId, list[ExpertKey]] = {}
        for key in command.reads:
            wanted.setdefault(key[0], []).append(key)
        await asyncio.gather(*(read_all(worker, keys) for worker, keys in wanted.items()))
        return done, errors[0] if errors else None


def _none(error: str | None = None) -> MigrationReport:
    return MigrationReport(done=(), nbytes=0, seconds=0.0, error=error)
