"""What happens to the control plane (events) and what it wants done (commands). Values only.

A command that takes time is answered by one event, which carries the command's epoch or ticket: an answer to
something that has been given up since is stale, and ignored.

    StartWorker -> WorkerLoaded | WorkerFailed | WorkerLost
    Transfer    -> TransferDone | TransferFailed
    Prepare     -> Prepared | PrepareFailed
    Commit      -> Committed | CommitFailed
    Probe       -> Probed
    Solve       -> PlanReady
    Weigh       -> Weighed
    StopWorker, Abandon, AbortSteps, Drain: no answer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, WorkerInfo
from elastic_moe.cluster.placement import Move, Placement, WorkerId

ExpertKey = tuple[WorkerId, int, int]
"""An expert at a worker: (worker, layer, logical expert)."""


# --- Events -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed. The first one starts the cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoaded:
    info: WorkerInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFailed:
    """A worker could not load. `fatal`: no other worker can load either (a checkpoint that cannot be served)."""

    worker: WorkerId
    reason: str
    fatal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """A worker's process is gone, or does not answer any more."""

    worker: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferDone:
    epoch: Epoch
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFailed:
    """Some transfers failed. The experts in `staged` arrived, and need not be brought again."""

    epoch: Epoch
    reason: str
    staged: tuple[ExpertKey, ...] = ()
    nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Every worker is ready to begin the epoch. `spec` is the command's, with the rendezvous that was opened for it."""

    spec: EpochSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareFailed:
    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    epoch: Epoch
    moved_requests: int = 0
    """Number of requests whose worker is no member any more. They are computed again on another worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitFailed:
    """Some workers may have begun the epoch, and others not."""

    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """The engine could not finish a step. The process group cannot be used any more."""

    epoch: Epoch
    suspects: tuple[WorkerId, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """Which workers did not answer, and why."""

    lost: tuple[tuple[WorkerId, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLost:
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """A new coordinator continues from a saved state. `engine_epoch` is the engine's epoch; None if it is not known."""

    engine_epoch: Epoch | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReady:
    """A planner's answer. `placement` is None if the planner failed; `reason` explains the answer."""

    ticket: int
    placement: Placement | None
    worthwhile: bool
    """The predicted saving beats what the change costs."""
    no_worse: bool
    """The predicted step is not longer than today's: enough for a change that a user asked for."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """Seconds of a step, priced on the window: under the placement in force, and under each of the command's, with what
    going there costs."""

    ticket: int
    present_s: float
    before_s: tuple[float, ...]
    tokens: int
    """Number of tokens in the window; 0 where there were too few to tell anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectChanged:
    """The counts of the last seconds are of another subject than those before."""

    first: bool = False
    """Whether there was none before, as after the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceRequested:
    """A user asks for a re-placement. `handle` raises ConflictError or NotReadyError if it is refused."""

    planner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRequested:
    """A user asks for `workers` workers, or for the workers without those in `retire`.

    `handle` raises ConflictError, NotReadyError or PlacementError if it is refused.
    """

    workers: int | None = None
    retire: tuple[WorkerId, ...] = ()
    operation_id: str | None = None
    """An id of the caller's. A second request with the same id changes nothing."""
    replace: bool = False
    """Whether to replace a scaling that still waits for workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceRequested:
    """A user asks for exactly this placement of the present workers.

    `handle` raises ConflictError, NotReadyError or PlacementError if it is refused.
    """

    placement: Placement
    pinned: bool | None = None
    """Whether to pin the placement; None: leave it as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpin:
    """Periodic re-placement may change the placement again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconfigured:
    """A redeploy has changed settings of the control plane; these are all that it may change (ControlSettings).

    `handle` raises PlacementError for a number of workers that is not possible.
    """

    workers: int
    min_workers: int | None
    max_workers: int | None
    autoscale_window_s: float
    rebalance_interval_s: float
    drain_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesDrain:
    """Ray's nodes that are about to leave, or are told to: node id -> seconds until it ends; None where not known.

    It is repeated while they drain.
    """

    nodes: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HomesSeen:
    """The nodes that have a free core for a worker: node id -> free cores."""

    free: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSeen:
    """The engine's load, on which the autoscaler decides."""

    waiting: int
    running: int
    kv_usage: float
    """Share of all KV-cache blocks in use, 0..1."""
    busy: tuple[WorkerId, ...] = ()
    """Workers that run requests."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingCounted:
    """The present sums of the routing window. They are stored; they do not begin a change."""

    load: npt.NDArray[np.int64]
    """[L, E] tokens per logical expert."""


Event = (
    Tick
    | WorkerLoaded
    | WorkerFailed
    | WorkerLost
    | TransferDone
    | TransferFailed
    | Prepared
    | PrepareFailed
    | Committed
    | CommitFailed
    | StepFailed
    | Probed
    | EngineLost
    | Resumed
    | PlanReady
    | Weighed
    | SubjectChanged
    | RebalanceRequested
    | PlaceRequested
    | Unpin
    | ScaleRequested
    | Reconfigured
    | NodesDrain
    | HomesSeen
    | LoadSeen
    | RoutingCounted
)


# --- Commands ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorker:
    """Create a worker and have it load the trunk and `experts` ([L] logical experts of each layer)."""

    worker: WorkerId
    experts: tuple[tuple[int, ...], ...]
    node: str | None = None
    """Where it is to run if there is room; None: where Ray finds room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWorker:
    """End a worker's process, if it still runs."""

    worker: WorkerId
    info: WorkerInfo | None
    """None if it has not loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Bring experts to the workers that hold them in `epoch`, from other workers or from the checkpoint."""

    epoch: Epoch
    copies: tuple[Move, ...]
    reads: tuple[ExpertKey, ...]
    urgent: bool = False
    """Whether to ignore the limit of bandwidth, because nothing is served until the transfer is done, or because a
    node ends soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Call `prepare` on every worker of `spec`.

    `forms_group`: open the places where they meet first, and see whether the engine reaches each of them.
    """

    spec: EpochSpec
    forms_group: bool
    infos: Mapping[WorkerId, WorkerInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Flip to `spec` through the engine, at a step boundary."""

    spec: EpochSpec
    infos: Mapping[WorkerId, WorkerInfo]
    """The members' addresses and properties, for the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """Have `workers` free the group and the staged experts of `epoch`, which was given up."""

    epoch: Epoch
    workers: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortSteps:
    """Have `workers` abort their steps of these epochs, which wait for a worker that will not answer."""

    epochs: tuple[Epoch, ...]
    workers: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Have the engine give no new requests to `workers`, and to exactly these."""

    workers: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Ask `workers` for a sign of life."""

    workers: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solve:
    """Ask a planner for a better placement of the current members."""

    ticket: int
    planner: str | None
    """None: the planner of the periodic re-placement."""
    settling: bool = False
    """Whether the subject of the traffic has just changed, so that the plan need not wait for a cool-down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weigh:
    """Price the placement in force on the window, and each of `before`, which earlier re-placements replaced."""

    ticket: int
    before: tuple[Placement, ...]


Command = StartWorker | StopWorker | Transfer | Prepare | Commit | Abandon | AbortSteps | Drain | Probe | Solve | Weigh
