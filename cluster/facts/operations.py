"""The record of operations: those under way and the last ones that ended, each with its reason."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from elastic_moe.cluster.errors import ConflictError
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.views import Operation, OperationKind, Phase
from elastic_moe.cluster.placement import WorkerId

HISTORY = 100
"""Number of operations that are kept, so that memory does not grow over months."""

ENDED = (Phase.COMPLETED, Phase.FAILED)


def new_operation_id(kind: OperationKind) -> str:
    """An id that a caller chooses. A call that is repeated, because the coordinator died, is carried out once by it."""
    return f"{kind}-{uuid.uuid4().hex[:8]}"


class OperationLog:
    """Operations by id, oldest first. Open ones are never forgotten."""

    def __init__(self) -> None:
        self._operations: OrderedDict[str, Operation] = OrderedDict()
        self._count = 0

    def open(
        self,
        kind: OperationKind,
        epoch: Epoch,
        reason: str,
        *,
        operation_id: str | None = None,
        asked: str = "",
        retiring: tuple[WorkerId, ...] = (),
    ) -> Operation:
        """Begin an operation. operation_id: an id of the caller's, which must be new; None: one is made."""
        assert operation_id not in self._operations, f"{operation_id} is taken"
        operation = Operation(
            operation_id=operation_id or self._new_id(kind),
            kind=kind,
            phase=Phase.PREPARING,
            epoch=epoch,
            reason=reason,
            asked=asked,
            retiring=retiring,
        )
        self._operations[operation.operation_id] = operation
        self._forget_old()
        return operation

    def _new_id(self, kind: OperationKind) -> str:
        while True:
            self._count += 1
            if (name := f"{kind}-{self._count}") not in self._operations:
                return name

    def advance(
        self, operation_id: str, *, phase: Phase | None = None, epoch: Epoch | None = None, reason: str | None = None
    ) -> None:
        """Change the given fields of an open operation."""
        operation = self._operations[operation_id]
        assert operation.phase not in ENDED, f"{operation_id} has ended"
        self._operations[operation_id] = replace(
            operation,
            phase=phase or operation.phase,
            epoch=epoch or operation.epoch,
            reason=reason or operation.reason,
        )

    def note_error(self, operation_id: str, error: str) -> None:
        """An attempt failed with this error, and the operation continues."""
        self._operations[operation_id] = replace(self._operations[operation_id], error=error)

    def stays(self, worker: WorkerId, go: Sequence[WorkerId] = ()) -> None:
        """A worker that was to leave stays. go: workers that are lost or must leave; one goes in its place."""
        for operation_id, operation in self._operations.items():
            if worker in operation.retiring:
                instead = [name for name in go if name not in operation.retiring][:1]
                others = [name for name in operation.retiring if name != worker]
                self._operations[operation_id] = replace(operation, retiring=(*others, *instead))

    def complete(self, operation_id: str, reason: str) -> None:
        self.advance(operation_id, phase=Phase.COMPLETED, reason=reason)
        # errors of earlier attempts are not the operation's error
        self._operations[operation_id] = replace(self._operations[operation_id], error=None)

    def fail(self, operation_id: str, error: str) -> None:
        self.advance(operation_id, phase=Phase.FAILED)
        self.note_error(operation_id, error)

    def fail_open(self, error: str) -> None:
        """Fail every open operation."""
        for operation in self._operations.copy().values():
            if operation.phase not in ENDED:
                self.fail(operation.operation_id, error)

    def forget(self, operation_id: str) -> None:
        """Remove an operation that ended and is not worth a line of its own."""
        del self._operations[operation_id]

    def get(self, operation_id: str) -> Operation | None:
        return self._operations.get(operation_id)

    def find_open(self, kind: OperationKind | None = None) -> Operation | None:
        """The oldest open operation, of `kind` if given."""
        for operation in self._operations.values():
            if operation.phase not in ENDED and kind in (None, operation.kind):
                return operation
        return None

    def conflict(self, operation_id: str, way_out: str = "") -> ConflictError:
        """The refusal of what cannot begin before this operation has ended."""
        operation = self._operations[operation_id]
        text = f"operation {operation_id} is under way ({operation.kind}: {operation.reason})"
        return ConflictError(text + (f"; {way_out}" if way_out else ""))

    def all(self) -> tuple[Operation, ...]:
        """Newest first."""
        return tuple(reversed(self._operations.values()))

    def _forget_old(self) -> None:
        surplus = len(self._operations) - HISTORY
        ended = [key for key, operation in self._operations.items() if operation.phase in ENDED]
        for key in ended[: max(0, surplus)]:
            del self._operations[key]
