"""How a worker finds the others of its groups: the doors that it opens, and joins that are under way or given up.

One thread joins a group at a time; any thread may give a join up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.placement import WorkerId
from elastic_moe.model.exchange.join import Exchange
from elastic_moe.model.exchange.meeting import Meeting

_DOORS = 4
"""Doors that are kept open: of the group that forms, and of attempts that were given up before they began."""


class Groups:
    """See the module."""

    def __init__(self, worker: WorkerId) -> None:
        self._worker = worker
        self._open: dict[str, Meeting] = {}
        """Doors that were opened and not used yet, by their tokens, the oldest first."""
        self._joining: dict[Epoch, Meeting] = {}
        """Those of groups that are being joined now."""
        self._abandoned: deque[Epoch] = deque(maxlen=_DOORS)
        """Epochs that were abandoned lately. Calls overtake one another, so their `prepare` may come later."""

    def open_door(self, address: str) -> Endpoint:
        """Where this worker waits for the others of a group that is to form. `address` is this node's. Raises OSError.

        `join` uses the door up; of those that none uses, the newest are kept open.
        """
        meeting = Meeting(address)
        self._open[meeting.endpoint.token] = meeting
        while len(self._open) > _DOORS:
            self._open.pop(next(iter(self._open))).close()
        return meeting.endpoint

    def check(self, epoch: Epoch) -> None:
        """Raises StepAborted if the epoch was abandoned."""
        if epoch in self._abandoned:
            raise StepAborted(f"epoch {epoch} was abandoned")

    def join(self, spec: EpochSpec, rank: int, join: Callable[[Meeting | None], Exchange]) -> Exchange:
        """Call `join` with this worker's door of `spec`, or None if the group needs none. `abandon` ends it early.

        Raises StepAborted if the door is closed, and what `join` raises.
        """
        meeting = self._open.pop(spec.doors[rank].token, None) if spec.doors else None
        if spec.doors and meeting is None:
            raise StepAborted(f"the door of {self._worker} for epoch {spec.epoch} is closed")
        if meeting is not None:
            self._joining[spec.epoch] = meeting
        try:
            return join(meeting)
        finally:
            self._joining.pop(spec.epoch, None)

    def abandon(self, epoch: Epoch) -> None:
        """Give up the join of an epoch that will not be committed, whether it is under way or is still to come."""
        self._abandoned.append(epoch)
        joining = self._joining.get(epoch)
        if joining is not None:
            joining.give_up()
