"""What the coordinator and the engine report of themselves: to /admin, to /metrics and to one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.fit import FitReport
from elastic_moe.cluster.messages.epochs import Epoch, PhaseCounts
from elastic_moe.cluster.placement import Move, Placement, WorkerId
from elastic_moe.cluster.redeploy import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """A snapshot for metrics, the admin API and the autoscaler."""

    running: dict[WorkerId, int] = field(default_factory=dict)
    waiting: int = 0
    kv_usage: dict[WorkerId, float] = field(default_factory=dict)
    """Share of KV-cache blocks in use, 0..1."""
    steps: int = 0
    preemptions: int = 0
    corrupted_requests: int = 0
    """Requests that were ended because their logits were not numbers."""
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    """Tokens that were looked up in prefix caches. The next field counts those that were found."""
    prefix_hits: int = 0
    first_tokens: int = 0
    """Requests that got their first token. The next field is the sum of their waits for it in the engine."""
    first_tokens_s: float = 0.0
    epoch: int = 0
    replicas: int = 1
    """API replicas that are connected."""

    @property
    def num_requests(self) -> int:
        """Those that run and those that wait."""
        return sum(self.running.values()) + self.waiting


class OperationKind(StrEnum):
    START = "start"
    REBALANCE = "rebalance"
    SCALE = "scale"
    RECOVER = "recover"
    PROMOTE = "promote"
    """Experts that are served from disk are brought into devices, beside the serving."""


class WorkerState(StrEnum):
    STARTING = "starting"
    """Its process starts or loads, or it has loaded and is no member yet."""
    SERVING = "serving"
    DRAINING = "draining"
    DEAD = "dead"
    """It was lost: its process, its node or its connection failed."""
    STOPPED = "stopped"
    """It was stopped since it is not needed any more, as after a smaller target or on a node that leaves."""
    STANDBY = "standby"
    """A spare process that is ready to load, and that becomes the next worker."""

    @property
    def ended(self) -> bool:
        """Whether its process is gone, or is being ended. Such workers stay listed for a while."""
        return self in (WorkerState.DEAD, WorkerState.STOPPED)


class Phase(StrEnum):
    PREPARING = "preparing"
    COMMITTING = "committing"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One change of the cluster, from the request to the end."""

    operation_id: str
    kind: OperationKind
    phase: Phase
    epoch: Epoch
    """The epoch that the operation makes, or would have made."""
    reason: str
    """Why the operation was begun; after its end, its outcome."""
    error: str | None = None
    asked: str = ""
    """What the request asked for, in words. A second request with the same id must have the same words."""
    retiring: tuple[WorkerId, ...] = ()
    """Workers that leave in this operation. Where another one is lost, or its node leaves, a worker that was to leave
    may stay; then the other one is named in its place."""
    progress: float = 0.0
    """0..1, coarse. It steps back when an attempt failed and is made again."""
    safe_to_terminate: bool = False
    """Whether every worker in `retiring` holds nothing and serves no request, so that its machine may go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    ready: bool
    reason: str
    """One line: what is being waited for, with progress; "serving" when ready, or "degraded" and why."""
    error: str | None = None
    """One line that says why the cluster will never be ready, such as a checkpoint that cannot be served; else None."""
    resident: float = 1.0
    """Share of the experts that lie in the devices of the workers that serve them, 0..1; the others lie on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigView:
    """What is in force in a cluster."""

    generation: Generation
    """Names the cluster: a redeploy that hands over to another cluster brings another name."""
    model_dir: str
    device: str | None
    """cpu or cuda; None before the model is opened."""
    config: ServeConfig
    """The cluster's settings, keys included: the API masks them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementView:
    epoch: Epoch
    placement: Placement
    pinned: bool = False
    """Whether periodic re-placement must not change the placement."""
    pinned_by: str | None = None
    """Id of the operation under way that pins the placement when it completes."""
    moves: tuple[Move, ...] = ()
    """Copies of the change under way, done or not; empty if there is no change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingView:
    """The sums of the routing window."""

    tokens: int
    window_s: float
    load: npt.NDArray[np.int64]
    """[L, E] tokens per logical expert."""
    load_imbalance: tuple[float, ...]
    """[L] busiest worker's load over the mean, under the placement in force; 1.0 for a layer without tokens."""
    prefill: PhaseCounts
    decode: PhaseCounts
    decode_weight: float
    """Time of a token in a decode step, relative to one in a prefill step. Planners weight tokens by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    id: WorkerId
    rank: int
    """-1 if it is no member of the epoch in force."""
    state: WorkerState
    pid: int
    node: str
    device: str
    running_requests: int
    kv_usage: float
    fit: FitReport | None = None
    """Which code serves the model there, and why no faster code does; None while it loads."""
    experts_served: int = 0
    """Over all layers."""
    experts_resident: int = 0
    """The experts of `experts_served` that are in its device now, its cache area included."""
    address: str = ""
    """IP address at which the engine and other workers reach it; empty while it loads."""
    link_gbps: Mapping[WorkerId, float] = field(default_factory=dict)
    """Gigabits per second between it and others, as measured when their group formed; empty where it was not."""
    waits_for: str | None = None
    """What its process waits for before it can start, such as a GPU; None if it waits for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleView:
    """How many workers there are and should be."""

    serving: int
    target: int
    min_workers: int
    max_workers: int
    """Limits by the autoscaler's settings, memory and the number of experts."""
    next_worker: WorkerId
    """Name that the next worker will get."""
    autoscaler: str | None
    """The reason of the autoscaler's last verdict; None if there is no autoscaler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadView:
    """The sums of the routing window, for a page."""

    tokens: int
    window_s: float
    load: npt.NDArray[np.float32]
    """[L, E] tokens per logical expert."""
    load_imbalance: float
    """Mean over layers of the busiest worker's load over the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """Identifies a placement and the sums of a routing window, so that nobody gets again what they have."""

    placement: tuple[Epoch, bool, str | None, Epoch | None] | None = None
    """The epoch in force, whether it is pinned, what will pin it, and the epoch of the change under way."""
    load: tuple[Epoch, int] | None = None
    """The epoch in force, and the number of reports that the window has taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """Everything that an open page shows of the cluster."""

    revision: Revision
    status: EngineStatus | None
    """The engine's last report; None while there is no engine that serves."""
    status_at_s: float
    """When the report came, by the coordinator's monotonic clock."""
    workers: list[WorkerView]
    operations: list[Operation]
    """The newest first."""
    scale: ScaleView
    recoveries: int
    experts_moved: int
    bytes_moved: int
    requests_moved: int
    placement: PlacementView | None
    """None before the first epoch, and if the asker has it already."""
    load: LoadView | None
    """None before the first epoch, and if the asker has it already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectPreview:
    """What a re-placement would do to a subject that the traffic has had before."""

    age_s: float
    """Seconds since the subject was last seen."""
    weight: float
    """Its share in the plan's price, 0..1; the present window has the rest."""
    cost_before: float
    cost_after: float
    """Predicted seconds per step under the cost model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancePreview:
    """What a re-placement would do; the answer to a dry run."""

    planner: str
    worthwhile: bool
    reason: str
    load_imbalance_before: float
    """Mean over layers of the busiest worker's load over the mean."""
    load_imbalance_after: float
    cost_before: float
    cost_after: float
    """Predicted seconds per step under the cost model."""
    moves: int
    bytes: int
    misses_before: float
    """Predicted experts that all workers fetch in a step, because they lie in no device; and (below) their bytes."""
    misses_after: float
    fetch_bytes_before: float
    fetch_bytes_after: float
    solver_status: str
    gap: float | None
    seconds: float
    subjects: tuple[SubjectPreview, ...] = ()
    """The remembered subjects that the plan was priced for; `cost_before` and `cost_after` are for them and the present
    window together."""
    placement: Placement | None = None
    """The placement that the re-placement would make."""
