"""Re-placement: when a planner is asked, and what becomes of its answer."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.epochs import ControlSettings, Epochs
from cluster.errors import ConflictError, NotReadyError
from cluster.events import PlanReady, RebalanceRequested, Solve
from cluster.protocol import Epoch, ModelInfo, Operation, Readiness


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """A planner at work."""

    ticket: int
    operation_id: str
    requested: bool
    forced: bool
    """A planner was asked for by name: what it says is done, whatever it is predicted to gain."""


class Rebalancing(Epochs):
    """Epochs, and the decision to make one for a better placement of the same workers."""

    def __init__(self, settings: ControlSettings, model: ModelInfo) -> None:
        super().__init__(settings, model)
        self.planning: Planning | None = None
        self.probing = False
        """Whether it is being found out who lives; until then no epoch is begun."""
        self._next_ticket = 1
        self._rebalance_at: float | None = None
        self._last_skipped: str | None = None

    def readiness(self) -> Readiness:
        raise NotImplementedError

    def _look_at_placement(self, now: float) -> None:
        if self._rebalance_at is not None and now >= self._rebalance_at and self._idle and self.broken is None:
            self._rebalance_at = now + self.settings.rebalance_interval_s
            if self.load.any():
                self._start_planning(None, "periodic look at the placement", requested=False)

    @property
    def _idle(self) -> bool:
        return self.spec is not None and self.change is None and self.planning is None and not self.probing

    def _require_idle(self) -> None:
        if self.change is not None or self.planning is not None:
            running = self.change.operation_id if self.change else self.planning.operation_id if self.planning else ""
            raise ConflictError(f"operation {running} is under way")
        if self.spec is None or self.broken is not None or self.probing:
            raise NotReadyError(self.readiness().reason)

    def _rebalance_requested(self, event: RebalanceRequested) -> None:
        self._require_idle()
        self._start_planning(event.planner, f"requested, planner {event.planner}", requested=True)

    def _start_planning(self, planner: str | None, reason: str, *, requested: bool) -> None:
        operation = self.operations.open("rebalance", Epoch(self._next_epoch), reason)
        self.planning = Planning(
            ticket=self._next_ticket,
            operation_id=operation.operation_id,
            requested=requested,
            forced=requested and planner != "auto",
        )
        self._next_ticket += 1
        self._out.append(Solve(ticket=self.planning.ticket, planner=planner))

    def _plan_ready(self, event: PlanReady, now: float) -> None:
        planning = self.planning
        if planning is None or event.ticket != planning.ticket:
            return
        self.planning = None
        assert self.spec is not None
        operation = self.operations.get(planning.operation_id)
        assert operation is not None
        if event.placement is None or tuple(worker.id for worker in event.placement.workers) != self.ranks:
            self.operations.fail(operation.operation_id, event.reason)
            self.counters.rebalances["failed"] += 1
        elif event.placement != self.spec.placement and (
            event.worthwhile or planning.forced or (planning.requested and event.no_worse)
        ):
            verdict = event.reason if event.worthwhile else f"done, although {event.reason}"
            self.operations.advance(operation.operation_id, reason=f"{operation.reason}: {verdict}")
            self._begin(operation, event.placement)
        else:
            self._skip(operation, event.reason, requested=planning.requested)

    def _skip(self, operation: Operation, reason: str, *, requested: bool) -> None:
        self.operations.complete(operation.operation_id, f"{operation.reason}: placement kept, {reason}")
        self.counters.rebalances["skipped"] += 1
        if not requested:
            # one line for a night of them, or they would push the history out
            if self._last_skipped is not None and self.operations.get(self._last_skipped):
                self.operations.forget(self._last_skipped)
            self._last_skipped = operation.operation_id

    def _cancel_planning(self, reason: str) -> None:
        if self.planning is not None:
            self.operations.fail(self.planning.operation_id, reason)
            self.counters.rebalances["failed"] += 1
            self.planning = None
