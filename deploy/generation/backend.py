"""The seam between HTTP and the cluster: what the API asks for, and nothing about how it is got.

`RayBackend` (ray_backend.py) is the real one; tests have one of their own that runs in process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from elastic_moe.cluster.facts.counters import ClusterCounters
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.messages.requests import GenerateRequest, TokenOutput
from elastic_moe.cluster.messages.views import (
    EngineStatus,
    Operation,
    PlacementView,
    Readiness,
    RebalancePreview,
    RoutingView,
    ScaleView,
    WorkerView,
)
from elastic_moe.cluster.placement import Placement, WorkerId


class Backend(Protocol):
    """Every method raises NotReadyError while there is nothing to ask yet."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenOutput]:
        """The request's tokens as they come, in order and without repeats; the last has a finish_reason.

        Closing the iterator before that aborts the request. Raises RequestError where the engine refuses it.
        """
        ...

    async def engine_status(self) -> EngineStatus: ...

    async def readiness(self) -> Readiness:
        """Answers at once and never raises: /ready is made from it."""
        ...

    @property
    def can_wait(self) -> bool:
        """Whether a request that nobody can serve now may wait: somebody has served, not too long ago."""
        ...

    async def model_info(self) -> ModelInfo: ...

    async def placement(self) -> PlacementView: ...

    async def routing(self) -> RoutingView: ...

    async def workers(self) -> list[WorkerView]: ...

    async def rebalance(self, planner: str, dry_run: bool) -> Operation | RebalancePreview:
        """Raises ConflictError, with the running operation's id, and UserError for an unknown planner."""
        ...

    async def scale(
        self, workers: int | None, retire: tuple[WorkerId, ...], operation_id: str | None, replace: bool
    ) -> Operation:
        """Raises ConflictError, and UserError for a number of workers, or a worker, that cannot be."""
        ...

    async def scaling(self) -> ScaleView: ...

    async def place(self, placement: Placement, pinned: bool | None) -> Operation:
        """Raises ConflictError, and UserError for a placement of other workers or of another model."""
        ...

    async def unpin(self) -> None: ...

    async def operations(self) -> list[Operation]: ...

    async def operation(self, operation_id: str) -> Operation | None: ...

    async def counters(self) -> ClusterCounters: ...

    @property
    def resumed_requests(self) -> int:
        """Requests that were submitted again since this replica began, because their engine was gone."""
        ...
