"""What the coordinator tells of its state: views for the admin API, and one log line for each thing of note."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from cluster.events import LoadSeen
from cluster.membership import Member
from cluster.operations import ENDED
from cluster.placement import WorkerId
from cluster.protocol import EngineStatus, Epoch, Operation, WorkerView
from cluster.state import ControlState

logger = logging.getLogger("actors.coordinator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What of a state is worth a log line when it changes."""

    epoch: Epoch
    broken: str | None
    pinned: bool
    operations: tuple[Operation, ...]

    @classmethod
    def of(cls, state: ControlState) -> Outline:
        return cls(epoch=state.epoch, broken=state.broken, pinned=state.pinned, operations=state.operations.all())


def log_changes(before: Outline, state: ControlState) -> None:
    if state.broken is not None and state.broken != before.broken:
        logger.warning("epoch %d cannot serve: %s", state.epoch, state.broken)
    if state.epoch != before.epoch and state.spec is not None:
        logger.info("epoch %d serves: %s over %s", state.epoch, ", ".join(state.ranks), state.spec.transport)
    known = {operation.operation_id: operation for operation in before.operations}
    for operation in reversed(state.operations.all()):
        old = known.get(operation.operation_id)
        if old is None:
            logger.info("%s begins: %s", operation.operation_id, operation.reason)
        elif operation.phase != old.phase and operation.phase in ENDED:
            logger.info("%s %s: %s", operation.operation_id, operation.phase, operation.error or operation.reason)
        elif operation.error is not None and operation.error != old.error:
            logger.warning("%s goes on after: %s", operation.operation_id, operation.error)


def worker_view(state: ControlState, member: Member, status: EngineStatus, device: str) -> WorkerView:
    """device: what is told of a worker that has not loaded yet."""
    info = member.info
    return WorkerView(
        id=member.id,
        rank=state.ranks.index(member.id) if member.alive and member.id in state.ranks else -1,
        state=member.state,
        pid=info.pid if info else 0,
        node=info.node if info else "",
        device=info.device if info else device,
        running_requests=status.running.get(member.id, 0),
        kv_usage=status.kv_usage.get(member.id, 0.0),
        fit=info.fit if info else None,
    )


def standby_view(worker: WorkerId, pid: int, device: str) -> WorkerView:
    """Of the process that waits to be the next worker."""
    return WorkerView(
        id=worker, rank=-1, state="standby", pid=pid, node="", device=device, running_requests=0, kv_usage=0.0
    )


def told(state: ControlState, operation: Operation) -> Operation:
    """`operation` with how far it is."""
    progress, safe = state.told(operation)
    return replace(operation, progress=progress, safe_to_terminate=safe)


def load_seen(status: EngineStatus) -> LoadSeen:
    usage = status.kv_usage.values()
    return LoadSeen(
        waiting=status.waiting,
        running=sum(status.running.values()),
        kv_usage=sum(usage) / len(usage) if usage else 0.0,
        busy=tuple(worker for worker, running in status.running.items() if running),
    )
