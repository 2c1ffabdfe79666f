"""What the coordinator and the engine report of themselves: to /admin, to /metrics and to one another."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.fit import FitReport
from elastic_moe.cluster.messages.epochs import Epoch, PhaseCounts
from elastic_moe.cluster.placement import Move, Placement, WorkerId


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
    """Tokens looked up in prefix caches, and (below) found there."""
    prefix_hits: int = 0
    first_tokens: int = 0
    """Requests that got their first token, and (below) the sum of their waits for it in the engine."""
    first_tokens_s: float = 0.0
    epoch: int = 0


class OperationKind(StrEnum):
    START = "start"
    REBALANCE = "rebalance"
    SCALE = "scale"
    RECOVER = "recover"
    PROMOTE = "promote"
    """Experts that are served from disk are brought into devices, beside the serving."""


class WorkerState(StrEnum):
    STARTING = "starting"
    """Created or loading, or loaded and not yet a member."""
    SERVING = "serving"
    DRAINING = "draining"
    DEAD = "dead"
    STANDBY = "standby"
    """A spare process that is ready to load, and that becomes the next worker."""


class Phase(StrEnum):
    PREPARING = "preparing"
    COMMITTING = "committing"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One change of the cluster, from request to end."""

    operation_id: str
    kind: OperationKind
    phase: Phase
    epoch: Epoch
    """The epoch that it makes, or would have made."""
    reason: str
    """Why it was begun; once ended, what came of it."""
    error: str | None = None
    asked: str = ""
    """What was asked for, in words. A second request with the same id must have the same words."""
    retiring: tuple[WorkerId, ...] = ()
    """Workers that leave by this operation."""
    progress: float = 0.0
    """0..1, coarse; it steps back where an attempt has to be made again."""
    safe_to_terminate: bool = False
    """Whether every worker in `retiring` holds nothing and serves no request, so that its machine may go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    ready: bool
    reason: str
    """One line: what is being waited for, with progress; "serving" when ready, or "degraded" and why."""
    error: str | None = None
    """Set where waiting is in vain, such as a checkpoint that cannot be served: one line."""
    resident: float = 1.0
    """Share of the experts that lie in the devices of the workers that serve them, 0..1; the others lie on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementView:
    epoch: Epoch
    placement: Placement
    pinned: bool = False
    """Periodic re-placement leaves it alone."""
    moves: tuple[Move, ...] = ()
    """Copies of the change under way, done or not; empty where nothing changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingView:
    """The statistics window."""

    tokens: int
    window_s: float
    load: npt.NDArray[np.int64]
    """[L, E] tokens per logical expert."""
    load_imbalance: tuple[float, ...]
    """[L] busiest worker's load over the mean, under the current placement; 1.0 where nothing was counted."""
    prefill: PhaseCounts
    decode: PhaseCounts
    decode_weight: float
    """Time of a token in decode over that of one in prefill, as planners weigh them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    id: WorkerId
    rank: int
    """-1 while it is not a member of the current epoch."""
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
    """Of those, the ones in its device now, its cache area included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleView:
    """How many workers there are and should be."""

    serving: int
    target: int
    min_workers: int
    max_workers: int
    """By the autoscaler's limits, memory and the number of experts."""
    autoscaler: str | None
    """What the autoscaler saw last and why it acted or not; None if there is no autoscaler."""


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
    solver_status: str
    gap: float | None
    seconds: float
    placement: Placement | None = None
    """What would be made so."""
