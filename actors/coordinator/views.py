"""What the coordinator reports of its state: views for the admin API, and one log line for each thing of note."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from elastic_moe.cluster.control.state import ControlState, Reasons
from elastic_moe.cluster.decisions import status as cluster_status
from elastic_moe.cluster.errors import NotReadyError
from elastic_moe.cluster.facts.facts import Cause, Facts, Outage
from elastic_moe.cluster.facts.links import Rates
from elastic_moe.cluster.facts.membership import WorkerRecord, serves
from elastic_moe.cluster.facts.operations import ENDED
from elastic_moe.cluster.facts.routing import RoutingWindow, decode_weight, load_imbalance
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.views import (
    ClusterView,
    EngineStatus,
    LoadView,
    Operation,
    PlacementView,
    Revision,
    RoutingView,
    WorkerState,
    WorkerView,
)
from elastic_moe.cluster.placement import Placement, WorkerId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The parts of a state whose changes are worth a log line."""

    epoch: Epoch
    outage: Outage | None
    pinned: bool
    operations: tuple[Operation, ...]
    reasons: Reasons = field(compare=False)
    """They change too often to be saved with each change."""

    @classmethod
    def of(cls, state: ControlState) -> Outline:
        facts = state.facts
        return cls(
            epoch=facts.epoch,
            outage=facts.outage,
            pinned=facts.pinned,
            operations=state.operations.all(),
            reasons=state.reasons,
        )


def log_changes(before: Outline, state: ControlState) -> None:
    facts = state.facts
    outage = facts.outage
    if outage is not None and (
        before.outage is None or (before.outage.reason, before.outage.cause) != (outage.reason, outage.cause)
    ):
        # of one dead worker the user reads one line: here that it is lost, and not before that a step failed
        quiet = facts.rests or outage.cause is Cause.STEP
        level, then = (logging.INFO, "") if quiet else (logging.WARNING, "; requests wait for the recovery")
        logger.log(level, "epoch %d does not serve: %s%s", facts.epoch, outage.reason, then)
    if facts.epoch != before.epoch and facts.spec is not None:
        logger.info("epoch %d serves: %s over %s", facts.epoch, ", ".join(facts.ranks), facts.spec.transport)
        if not facts.spec.placement.all_resident:
            logger.info("epoch %d is %s", facts.epoch, cluster_status.serving(facts).reason)
    for what, old_reason, reason in zip(Reasons._fields, before.reasons, state.reasons, strict=True):
        if reason != old_reason:
            logger.debug("decided on %s: %s", what, reason)
    known = {operation.operation_id: operation for operation in before.operations}
    for operation in reversed(state.operations.all()):
        old = known.get(operation.operation_id)
        about = {"operation_id": operation.operation_id}
        if old is None:
            logger.info("%s begins: %s", operation.operation_id, operation.reason, extra=about)
        elif operation.phase != old.phase and operation.phase in ENDED:
            outcome = operation.error or operation.reason
            logger.info("%s %s: %s", operation.operation_id, operation.phase, outcome, extra=about)
        elif operation.error is not None and operation.error != old.error:
            logger.warning("%s goes on after: %s", operation.operation_id, operation.error, extra=about)


def worker_view(
    facts: Facts,
    record: WorkerRecord,
    status: EngineStatus,
    device: str,
    resident: int | None,
    link_gbps: Mapping[WorkerId, float] | None = None,
    waits_for: str | None = None,
) -> WorkerView:
    """device: the device to show for a worker that has not loaded yet. resident: experts in its device, as it has
    reported; None if it has not. link_gbps: what it has measured. waits_for: as in WorkerView."""
    info = record.info
    member = record.alive and facts.spec is not None and record.id in facts.ranks
    served = serves(facts.spec.placement, record.id) if member and facts.spec is not None else record.held
    return WorkerView(
        id=record.id,
        rank=facts.ranks.index(record.id) if member else -1,
        state=record.state,
        pid=info.pid if info else 0,
        node=info.node if info else "",
        device=info.device if info else device,
        running_requests=status.running.get(record.id, 0),
        kv_usage=status.kv_usage.get(record.id, 0.0),
        fit=info.fit if info else None,
        experts_served=int(served.sum()),
        experts_resident=resident or int(record.held.sum()),
        address=info.endpoint.address if info else "",
        link_gbps=link_gbps or {},
        waits_for=waits_for,
    )


def worker_views(
    state: ControlState,
    status: EngineStatus,
    resident: Mapping[WorkerId, int],
    link_gbps: Rates,
    standby: tuple[WorkerId, int] | None,
    device: str,
    waits_for: Callable[[WorkerRecord], str | None] = lambda _: None,
) -> list[WorkerView]:
    """Every worker, and the standby (name and process id) if there is one. resident: experts in devices, as
    the workers have reported."""
    facts = state.facts
    views = [
        worker_view(facts, record, status, device, resident.get(record.id), link_gbps.get(record.id), waits_for(record))
        for record in facts.records.values()
    ]
    return views if standby is None else [*views, standby_view(*standby, device)]


def operation_views(state: ControlState) -> list[Operation]:
    """Every operation with its progress, the newest first."""
    facts = state.facts
    return [with_progress(facts, operation) for operation in state.operations.all()]


def newest_operation(state: ControlState) -> Operation:
    """The operation that was begun last, with its progress."""
    return with_progress(state.facts, state.operations.all()[0])


def placement_view(state: ControlState) -> PlacementView:
    """Raises NotReadyError before the first epoch."""
    facts = state.facts
    if facts.spec is None:
        raise NotReadyError(state.readiness().reason)
    moves = () if facts.change is None else facts.change.transfers.copies
    return PlacementView(
        epoch=facts.epoch,
        placement=facts.spec.placement,
        pinned=facts.pinned,
        pinned_by=_pinned_by(state),
        moves=tuple(moves),
    )


def _pinned_by(state: ControlState) -> str | None:
    operation = None if state.facts.pins is None else state.operations.get(state.facts.pins)
    return None if operation is None or operation.phase in ENDED else operation.operation_id


def routing_view(window: RoutingWindow, placement: Placement, now: float) -> RoutingView:
    prefill, decode = window.phases(now)
    load = prefill.load + decode.load
    return RoutingView(
        tokens=prefill.tokens + decode.tokens,
        window_s=window.window_s,
        load=load,
        load_imbalance=tuple(load_imbalance(load, placement).tolist()),
        prefill=prefill,
        decode=decode,
        decode_weight=decode_weight(prefill, decode),
    )


def standby_view(worker: WorkerId, pid: int, device: str) -> WorkerView:
    """The view of the process that waits to become the next worker."""
    return WorkerView(
        id=worker, rank=-1, state=WorkerState.STANDBY, pid=pid, node="", device=device, running_requests=0, kv_usage=0.0
    )


def cluster_view(
    state: ControlState,
    window: RoutingWindow,
    workers: list[WorkerView],
    status: EngineStatus | None,
    status_at_s: float,
    known: Revision,
    now: float,
) -> ClusterView:
    """What an open page shows, without the placement and the loads that it has by `known`."""
    facts, counters = state.facts, state.counters
    under_way = None if facts.change is None else facts.change.spec.epoch
    revision = Revision(
        placement=(facts.epoch, facts.pinned, _pinned_by(state), under_way), load=(facts.epoch, window.reports)
    )
    view = None if facts.spec is None else placement_view(state)
    return ClusterView(
        revision=revision,
        status=status,
        status_at_s=status_at_s,
        workers=workers,
        operations=operation_views(state),
        scale=state.view(),
        recoveries=sum(counters.recoveries.values()),
        experts_moved=counters.experts_moved,
        bytes_moved=counters.bytes_moved,
        requests_moved=counters.requests_moved,
        placement=None if revision.placement == known.placement else view,
        load=None if view is None or revision.load == known.load else load_view(window, view.placement, now),
    )


def load_view(window: RoutingWindow, placement: Placement, now: float) -> LoadView:
    load = window.load(now)
    return LoadView(
        tokens=window.tokens(now),
        window_s=window.window_s,
        load=load.astype(np.float32),
        load_imbalance=float(load_imbalance(load, placement).mean()) if len(load) else 1.0,
    )


def with_progress(facts: Facts, operation: Operation) -> Operation:
    """`operation` with its progress."""
    progress = cluster_status.progress(facts, operation)
    return replace(operation, progress=progress.share, safe_to_terminate=progress.safe_to_terminate)
