"""What is known of the cluster at one moment, as one frozen value. Every decision is a function of it and of `now`.

Each fact has one owner, which alone changes it: Membership (workers), Epochs (the epoch in force, an outage, the change
under way), Rebalancing, Scaling, Draining, Starts. ControlState puts their facts together; nobody changes a `Facts`.

Legend: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.facts.adaptation import slots_of, tiered_slots_of
from elastic_moe.cluster.facts.membership import WorkerRecord
from elastic_moe.cluster.facts.tiering import Room
from elastic_moe.cluster.facts.transfers import Transfers
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, ModelInfo
from elastic_moe.cluster.messages.views import OperationKind, WorkerState
from elastic_moe.cluster.placement import Placement, WorkerId

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """What was decided, and why: a few words that fit after "because" or into a log line."""

    value: T
    reason: str


class Cause(StrEnum):
    """The cause of a recovery."""

    WORKER = "worker"
    """A worker died or hangs."""
    ENGINE = "engine"
    STEP = "step"
    """A step failed, and nobody has died."""
    FLIP = "flip"
    """Some workers may have begun an epoch, and others not."""
    IDLE = "idle"
    """There was no request for long, and no worker is kept. The next request is the end of it."""
    COORDINATOR = "coordinator"
    """The coordinator was restarted, which interrupts nothing that runs."""


class Stage(StrEnum):
    """The stage that a change has reached."""

    PLANNING = "planning"
    """A planner is at work, and there is no change yet. Only a re-placement has this stage."""
    TRANSFERRING = "transferring"
    DRAINING = "draining"
    """Every expert is in its place; workers that leave may finish what they run."""
    PREPARING = "preparing"
    COMMITTING = "committing"


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSettings:
    workers: int
    redundant_experts: int = 0
    rebalance_interval_s: float = 60.0
    """Seconds between two periodic looks at the placement; 0: only on request."""
    shared_gpus: bool = False
    """Workers share GPUs, which NCCL cannot do."""
    min_workers: int | None = None
    max_workers: int | None = None
    """The autoscaler's limits. Requests of users must keep to them too. None: there is no autoscaler."""
    autoscale_window_s: float = 15.0
    seats_per_worker: int = 64
    """Requests that a worker runs at a time."""
    drain_timeout_s: float = 30.0
    """Seconds that the requests of a worker that leaves may take; then they move."""
    expert_capacity: int | None = None
    """Experts that every worker has memory for, over all layers; None: each worker reports its own."""
    cluster_id: str = "emoe"
    """Part of every process group's name, so that two clusters on one machine do not meet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """Why the epoch in force cannot serve, and since when."""

    reason: str
    cause: Cause
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """An attempt to make the next epoch."""

    operation_id: str
    kind: OperationKind
    spec: EpochSpec
    goal: Placement
    """The placement to be reached in the end: it serves as `spec` does, with more experts in devices."""
    forms_group: bool
    transfers: Transfers
    stage: Stage
    stage_since: float
    urgent: bool
    """Whether nothing is served until the change is done."""
    nbytes: int = 0
    """Bytes of experts that were brought for it."""

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        return tuple(worker.id for worker in self.spec.placement.workers)

    @property
    def yields(self) -> bool:
        """Whether any other change may take its place, because it only brings experts into devices."""
        return self.kind is OperationKind.PROMOTE and self.stage in (Stage.TRANSFERRING, Stage.DRAINING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """A planner at work, or a re-placement that waits to be begun again."""

    ticket: int
    operation_id: str
    since: float
    requested: bool
    forced: bool
    """Whether a user named the planner: then its plan is carried out, even if no gain is predicted."""
    waits: bool = False
    """Whether it was interrupted, and is begun again once the cluster serves and no change is under way."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Facts:
    settings: ControlSettings
    model: ModelInfo
    records: Mapping[WorkerId, WorkerRecord]
    """In the order in which they were asked for, which is rank order. Some that have ended are remembered."""
    probing: bool
    """Workers are being asked for a sign of life; no epoch is begun before all have answered or are known lost."""
    busy: tuple[WorkerId, ...] | None
    """Workers that run requests; None if the engine has not reported since the last Drain command."""
    spec: EpochSpec | None
    """The epoch in force; None before the first."""
    goal: Placement | None
    """What the placement in force is to become once all its experts have been brought into devices."""
    epoch_since: float
    outage: Outage | None
    """None while the epoch in force serves."""
    change: Change | None
    next_epoch: Epoch
    planning: Planning | None
    pinned: bool
    """Whether periodic re-placement must not change the placement."""
    pins: str | None
    """Id of the operation that pins the placement when it completes. It may have failed."""
    target: int
    """Number of workers that there should be."""
    load: npt.NDArray[np.int64]
    """[L, E] recent tokens per expert. Lost experts are placed by them."""
    retry_at: float
    """No change begins before this time, because the last attempt failed."""
    start_at: float
    """No worker is started before this time, because the last one died while it loaded."""
    fatal: str | None
    """Why there will never be a first epoch."""

    @property
    def epoch(self) -> Epoch:
        return self.spec.epoch if self.spec else Epoch(0)

    @property
    def ranks(self) -> tuple[WorkerId, ...]:
        """Members of the epoch in force, in rank order; ended ones included until the next epoch."""
        return tuple(worker.id for worker in self.spec.placement.workers) if self.spec else ()

    def split(self, records: Iterable[WorkerRecord]) -> tuple[list[WorkerRecord], list[WorkerRecord]]:
        """(Those of these workers that are members of the epoch in force, the others), each in their order."""
        members, given = set(self.ranks), list(records)
        return [r for r in given if r.id in members], [r for r in given if r.id not in members]

    @property
    def serves(self) -> bool:
        return self.spec is not None and self.outage is None

    @property
    def rests(self) -> bool:
        """Whether no worker is kept, because there are no requests, or the first ones after that are starting."""
        return self.outage is not None and self.outage.cause is Cause.IDLE

    @property
    def alive(self) -> list[WorkerRecord]:
        return [record for record in self.records.values() if record.alive]

    @property
    def loaded(self) -> list[WorkerRecord]:
        return [record for record in self.alive if record.loaded]

    @property
    def staying(self) -> list[WorkerRecord]:
        """Living workers that are not to leave, nor to move."""
        return [r for r in self.alive if r.state is not WorkerState.DRAINING and not r.moves]

    @property
    def moving(self) -> list[WorkerRecord]:
        """Living workers that serve until others have loaded in their place."""
        return [r for r in self.alive if r.state is not WorkerState.DRAINING and r.moves]

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return self.spec is not None and self.change is None and self.planning is None and not self.probing

    @property
    def interruptible(self) -> bool:
        """Whether nothing is under way that does not give way to other changes."""
        return self.idle or (self.change is not None and self.change.yields and not self.probing)

    @property
    def scaled(self) -> bool:
        """Whether as many workers serve as there should be, and none of them is to leave."""
        leaving = any(self.records[worker].state is WorkerState.DRAINING for worker in self.ranks)
        return len(self.ranks) == self.target and not leaving

    @property
    def whole(self) -> bool:
        """Whether everything is as it should be, and nothing under way."""
        return self.idle and self.serves and self.scaled

    # --- Memory -------------------------------------------------------------------------------------------------

    def limits(self, members: Sequence[WorkerRecord]) -> list[int]:
        """Experts per layer that fit in the device of each. One that has not loaded yet is taken to have what others
        have."""
        usual = self.usual_capacity
        return [self._limit(usual if record.info is None else record.capacity) for record in members]

    def _limit(self, capacity: int | None) -> int:
        return self.model.num_logical_experts if capacity is None else capacity // self.model.num_layers

    @property
    def usual_capacity(self) -> int | None:
        """Experts, over all layers, that a worker which has not loaded yet is taken to have memory for."""
        capacities = [record.capacity for record in self.alive if record.capacity is not None]
        return min(capacities, default=self.settings.expert_capacity)

    @property
    def usually_tiered(self) -> bool:
        """Whether a worker which has not loaded yet is taken to serve experts from disk, too."""
        return not self.loaded or any(record.tiered for record in self.loaded)

    def tiered(self, members: Sequence[WorkerRecord], coming: int = 0) -> bool:
        """Whether each can serve experts from disk, and so many that have yet to be started."""
        if coming and (others := self._like_others) and not any(record.tiered for record in others):
            return False
        return all(record.tiered if record.info is not None else self.usually_tiered for record in members)

    @property
    def _like_others(self) -> list[WorkerRecord]:
        """The workers that show what others will have: those that have loaded, or else the last that served."""
        return self.loaded or [r for r in map(self.records.get, self.ranks) if r is not None and r.info is not None]

    def rooms(self, members: Sequence[WorkerRecord]) -> dict[WorkerId, Room | None]:
        """What each has for experts; None for one without a disk tier, or with memory for everything. Workers of a node
        share its disk, which each has measured alone."""
        readers = Counter(record.info.node for record in members if record.info is not None)
        rooms: dict[WorkerId, Room | None] = {}
        for record in members:
            info = record.info
            if info is None or info.disk_bytes_per_s is None or info.expert_capacity is None:
                rooms[record.id] = None
                continue
            rooms[record.id] = Room(
                device=info.expert_capacity,
                host=info.host_capacity,
                disk_bytes_per_s=info.disk_bytes_per_s / readers[info.node],
                host_bytes_per_s=info.host_bytes_per_s,
            )
        return rooms

    def slots(self, members: Sequence[WorkerRecord], coming: int = 0) -> tuple[int, ...] | None:
        """Slots per layer of each, and of so many that have yet to be started; None where they have too little memory
        and cannot serve from disk."""
        experts = self.model.num_logical_experts
        capacities = [record.capacity for record in self._like_others if record.capacity is not None]
        another = self._limit(min(capacities, default=self.settings.expert_capacity))
        limits = self.limits(members) + coming * [another]
        found = slots_of(limits, experts, self.settings.redundant_experts)
        return tiered_slots_of(limits, experts) if found is None and self.tiered(members, coming) else found

    def fits(self, members: Sequence[WorkerRecord], coming: int = 0) -> bool:
        """Whether `members` can serve every expert, together with so many that have yet to be started."""
        return self.slots(members, coming) is not None

    @property
    def fewest(self) -> int:
        """The least number of today's workers that can serve every expert."""
        best = sorted(self.alive, key=lambda record: -self.limits([record])[0])
        return next((n for n in range(1, len(best)) if self.slots(best[:n]) is not None), max(1, len(best)))
