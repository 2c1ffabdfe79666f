"""The interface between HTTP and the cluster: the questions of the API, without the ways to answer them.

`Groups` (groups.py) implements it over the groups of a cluster, each of which is a `RayBackend` (ray_backend.py); tests
have a backend that runs in one process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from elastic_moe.cluster.errors import EmoeError
from elastic_moe.cluster.facts.counters import ClusterCounters
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, TokenOutput
from elastic_moe.cluster.messages.views import (
    ClusterView,
    ConfigView,
    EngineStatus,
    Operation,
    PlacementView,
    Readiness,
    RebalancePreview,
    Revision,
    RoutingView,
    ScaleView,
    WorkerView,
)
from elastic_moe.cluster.placement import Placement, WorkerId


class GenerationFailed(EmoeError):
    """The engine has ended a request because of a fault that is not in the request."""


class Group(Protocol):
    """One group of workers with its engine. Every method raises NotReadyError while there is nobody to ask."""

    async def readiness(self) -> Readiness:
        """As of the Backend, of this group alone."""
        ...

    async def engine_status(self) -> EngineStatus: ...

    async def config(self) -> ConfigView:
        """What is in force in the cluster, with keys."""
        ...

    async def placement(self) -> PlacementView: ...

    async def routing(self) -> RoutingView: ...

    async def workers(self) -> list[WorkerView]: ...

    async def cluster(self, known: Revision) -> ClusterView:
        """Everything that an open page shows. `known` is the revision of the last answer, to leave out what it had."""
        ...

    async def rebalance(self, planner: str, dry_run: bool) -> Operation | RebalancePreview:
        """Raises ConflictError, which names the running operation, and UserError for an unknown planner."""
        ...

    async def scale(
        self, workers: int | None, retire: tuple[WorkerId, ...], operation_id: str | None, replace: bool
    ) -> Operation:
        """Raises ConflictError, and UserError for an impossible number of workers or an unknown worker."""
        ...

    async def scaling(self) -> ScaleView: ...

    async def place(self, placement: Placement, pinned: bool | None) -> Operation:
        """Raises ConflictError, and UserError for a placement of other workers or of another model."""
        ...

    async def unpin(self) -> None: ...

    async def operations(self) -> list[Operation]: ...

    async def operation(self, operation_id: str) -> Operation | None: ...

    async def counters(self) -> ClusterCounters: ...


class Backend(Protocol):
    """All groups together. Every method raises NotReadyError while there is no group to ask."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenOutput]:
        """The request's tokens as they come, in order and without repeats. The last output has a finish_reason.

        Closing the iterator before the last output aborts the request, unless it is lasting. Raises RequestError where
        the engine refuses it. Of a lasting request that the engine has already, all tokens come, from the first one.
        """
        ...

    def cancel(self, request_id: RequestId) -> None:
        """End a lasting request: its last output will have the reason ABORT.

        Raises KeyError where this replica does not generate it.
        """
        ...

    async def orphans(self, request_ids: Sequence[RequestId]) -> tuple[RequestId, ...]:
        """Those of these lasting requests that no replica generates; none while there is no engine that could know."""
        ...

    def forget(self, request_id: RequestId) -> None:
        """The engine need not keep the answer of this lasting request, which has ended, any longer."""
        ...

    async def readiness(self) -> Readiness:
        """Whether the cluster is ready. Returns at once and never raises, since /ready is made of it."""
        ...

    @property
    def can_wait(self) -> bool:
        """Whether a request may wait while no worker can serve it: some worker has served, and not too long ago."""
        ...

    async def model_info(self) -> ModelInfo: ...

    @property
    def num_groups(self) -> int: ...

    def group(self, number: int) -> Group:
        """One of the groups, from 0. Raises RequestError where there is none of this number."""
        ...

    def group_of(self, request_id: RequestId) -> int:
        """Number of the group that generates the request; 0 where it has ended."""
        ...

    @property
    def resumed_requests(self) -> int:
        """Number of requests that this replica has submitted again because their engine was lost."""
        ...
