"""Workers that are to leave: the engine gives them no new requests, and their requests get time to finish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic_moe.cluster.facts.events import Command, Drain
from elastic_moe.cluster.facts.facts import Choice, Facts
from elastic_moe.cluster.facts.membership import WorkerRecord
from elastic_moe.cluster.messages.views import WorkerState
from elastic_moe.cluster.placement import WorkerId

FLIP_S = 5.0
"""Seconds before the end of a node at which its workers' requests move: the epoch without them begins meanwhile."""


def leaving(facts: Facts) -> tuple[WorkerId, ...]:
    """Members of the epoch that are to leave. Empty if all are to leave: then they have to continue to serve."""
    names = tuple(worker for worker in facts.ranks if facts.records[worker].state is WorkerState.DRAINING)
    return () if len(names) == len(facts.ranks) else names


def drained(facts: Facts, now: float) -> Choice[bool]:
    """Whether the change may go on: every worker that leaves has finished its requests or used up its time."""
    change = facts.change
    assert change is not None
    if change.urgent or facts.outage is not None:
        return Choice(True, "nothing is served until the change is made")
    for record in (facts.records[worker] for worker in facts.ranks if worker not in change.workers):
        runs = facts.busy is None or record.id in facts.busy
        if record.alive and runs and now < _until(record, facts.settings.drain_timeout_s):
            return Choice(False, f"{record.id} may finish its requests first")
    return Choice(True, "no worker that leaves has requests to finish")


def _until(record: WorkerRecord, drain_timeout_s: float) -> float:
    """The time until which the requests of a worker that leaves may run there."""
    until = record.draining_since + drain_timeout_s
    return until if record.leave_by is None else min(until, record.leave_by - FLIP_S)


def may_rest(facts: Facts) -> bool:
    """Whether the last workers may end, because none is wanted and no request needs them."""
    if facts.target or facts.rests or facts.spec is None or facts.change is not None or facts.probing:
        return False
    # those that are left after a failure end too if they cannot serve: a request that waits starts others
    return facts.busy == () if facts.serves else not facts.fits(facts.loaded)


# --- Nodes that leave ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaver:
    """A worker whose node leaves."""

    worker: WorkerId
    left_s: float | None
    """Seconds until the node ends; None where that is not known."""


def leavers(facts: Facts, nodes: Mapping[str, float | None]) -> tuple[Leaver, ...]:
    """The living workers on these nodes that are not known to leave with them. nodes: as in NodesDrain.

    A worker that a user has retired gets its node's deadline here, once.
    """
    found = []
    for record in facts.alive:
        if record.info is None or record.info.node not in nodes:
            continue
        left_s = nodes[record.info.node]
        knows = record.state is WorkerState.DRAINING and record.retired
        if not knows or (record.leave_by is None and left_s is not None):
            found.append(Leaver(worker=record.id, left_s=left_s))
    return tuple(found)


def notice(found: Sequence[Leaver]) -> str:
    """The words for these workers in an operation."""
    parts = []
    for leaver in found:
        when = "" if leaver.left_s is None else f", in {leaver.left_s:.0f} s"
        parts.append(f"the node of {leaver.worker} leaves{when}")
    return "; ".join(parts)


# --- The owner ----------------------------------------------------------------------------------------------------


class Draining:
    """Owns the list of workers that the engine spares, and the engine's report of which workers run requests."""

    def __init__(self) -> None:
        self._spared: tuple[WorkerId, ...] | None = ()
        """Workers that the engine gives no new requests; None if that is not known."""
        self.busy: tuple[WorkerId, ...] | None = None
        """Workers that run requests; None if the engine has not reported since the last Drain command."""

    def seen(self, busy: tuple[WorkerId, ...]) -> None:
        self.busy = busy

    def engine_lost(self) -> None:
        """The next engine spares no worker until it gets a Drain command."""
        self._spared, self.busy = (), None

    def resume(self) -> None:
        """The last Drain command is not known any more, because the coordinator was restarted."""
        self._spared = self.busy = None

    def spare(self, facts: Facts) -> list[Command]:
        """Command the engine to spare exactly the workers that leave, unless it already does."""
        names = leaving(facts)
        if not facts.serves or names == self._spared:
            return []
        self._spared, self.busy = names, None
        return [Drain(workers=names)]
