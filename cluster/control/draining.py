"""Workers that are to leave: the engine is told to spare them, and their requests get time to finish."""

from __future__ import annotations

from elastic_moe.cluster.facts.events import Command, Drain
from elastic_moe.cluster.facts.facts import Choice, Facts
from elastic_moe.cluster.messages.views import WorkerState
from elastic_moe.cluster.placement import WorkerId


def leaving(facts: Facts) -> tuple[WorkerId, ...]:
    """Members that are to leave, and that the others can spare: nobody where all are to leave."""
    names = tuple(worker for worker in facts.ranks if facts.members[worker].state is WorkerState.DRAINING)
    return () if len(names) == len(facts.ranks) else names


def drained(facts: Facts, now: float) -> Choice[bool]:
    """Whether the change under way may go on: whoever leaves by it has finished its requests, or has had its time."""
    change = facts.change
    assert change is not None
    if change.urgent or facts.outage is not None:
        return Choice(True, "nothing is served until the change is made")
    for member in (facts.members[worker] for worker in facts.ranks if worker not in change.workers):
        runs = facts.busy is None or member.id in facts.busy
        if member.alive and runs and now - member.draining_since < facts.settings.drain_timeout_s:
            return Choice(False, f"{member.id} may finish its requests first")
    return Choice(True, "nobody that leaves has requests to finish")


class Draining:
    """Owns what the engine was told of this, and what it said of who runs requests."""

    def __init__(self) -> None:
        self._told: tuple[WorkerId, ...] | None = ()
        """Workers that the engine spares; None where that is not known."""
        self.busy: tuple[WorkerId, ...] | None = None
        """Workers that run requests; None where nothing was heard since the engine was told to drain some."""

    def seen(self, busy: tuple[WorkerId, ...]) -> None:
        self.busy = busy

    def engine_lost(self) -> None:
        """The next engine spares nobody until it is told to."""
        self._told, self.busy = (), None

    def resume(self) -> None:
        """What the engine was told last is not known any more."""
        self._told = self.busy = None

    def tell(self, facts: Facts) -> list[Command]:
        """Have the engine spare exactly those that leave, where it does not do so yet."""
        names = leaving(facts)
        if not facts.serves or names == self._told:
            return []
        self._told, self.busy = names, None
        return [Drain(workers=names)]
