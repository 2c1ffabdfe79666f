"""The control plane's record of each worker. `Membership` owns these records.

Legend: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.facts.events import ExpertKey, Probe, StartWorker, StopWorker
from elastic_moe.cluster.messages.epochs import WorkerInfo
from elastic_moe.cluster.messages.views import WorkerState
from elastic_moe.cluster.placement import EMPTY, Placement, Tier, WorkerId

BoolArray = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

ENDED_REMEMBERED = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WorkerRecord:
    """What is known of a worker, from the command that starts it.

    `held` and `staged` may lack experts that the worker has, but contain none that it has not.
    """

    id: WorkerId
    state: WorkerState
    assigned: BoolArray
    """[L, E] experts that the worker loads when it starts."""
    held: BoolArray
    """[L, E] experts that the worker holds in its device under the epoch in force."""
    staged: BoolArray
    """[L, E] experts that were brought to the worker since the epoch began."""
    perhaps: BoolArray
    """[L, E] experts that may lie in its device besides, since the outcome of a flip is not known. They take memory."""
    asked_at: float
    perhaps_serves: BoolArray | None = None
    """[L, E] experts, in whichever tier, that such a flip may have given it to serve; None: no others."""
    info: WorkerInfo | None = None
    loaded_at: float | None = None
    retired: bool = False
    """Whether the worker leaves because a user named it or its node leaves, and not because there are too many."""
    moves: bool = False
    """Whether another one is started in its place, on a node that came later. It serves until that one has loaded."""
    draining_since: float = 0.0
    leave_by: float | None = None
    """When its node ends; None where that is not known, or its node stays."""
    strikes: int = 0
    """Number of failed steps in a row with this worker as a suspect."""
    failed_joins: int = 0
    """Number of attempts in a row to form a group with this worker that failed."""

    @property
    def alive(self) -> bool:
        return not self.state.ended

    @property
    def loaded(self) -> bool:
        return self.alive and self.info is not None

    @property
    def has(self) -> BoolArray:
        return self.held | self.staged

    @property
    def capacity(self) -> int | None:
        """Experts that its device has memory for, over all layers; None where that is not limited, or not known yet."""
        return None if self.info is None else self.info.expert_capacity

    @property
    def tiered(self) -> bool:
        """Whether it can serve experts that do not lie in its device."""
        return self.info is not None and self.info.disk_bytes_per_s is not None


class Membership:
    """Every worker from the moment it is asked for until it is forgotten, in the order in which they were asked for."""

    def __init__(self, shape: tuple[int, int]) -> None:
        """shape: (L, E)."""
        self._nothing: BoolArray = np.zeros(shape, dtype=np.bool_)
        self._nothing.setflags(write=False)
        self._records: dict[WorkerId, WorkerRecord] = {}
        self._asked = 0
        self.probing = False
        """Whether workers are being asked for a sign of life."""

    @property
    def records(self) -> dict[WorkerId, WorkerRecord]:
        """A copy, as things are now."""
        return dict(self._records)

    @property
    def alive(self) -> list[WorkerRecord]:
        return [record for record in self._records.values() if record.alive]

    @property
    def loaded(self) -> tuple[WorkerId, ...]:
        return tuple(record.id for record in self.alive if record.loaded)

    @property
    def hurries(self) -> bool:
        """Whether a worker must leave by a certain time."""
        return any(record.leave_by is not None for record in self.alive)

    @property
    def next_worker(self) -> WorkerId:
        return WorkerId(f"w{self._asked}")

    def get(self, worker: WorkerId) -> WorkerRecord | None:
        return self._records.get(worker)

    def __getitem__(self, worker: WorkerId) -> WorkerRecord:
        return self._records[worker]

    def _set(self, worker: WorkerId, **facts: Any) -> None:
        self._records[worker] = replace(self._records[worker], **facts)

    # --- Coming and going ---------------------------------------------------------------------------------------

    def start(self, assigned: BoolArray, now: float, node: str | None = None) -> StartWorker:
        """Ask for one more worker, which is to load `assigned` ([L, E]), on `node` if that has room."""
        worker = self.next_worker
        self._asked += 1
        self._records[worker] = WorkerRecord(
            id=worker,
            state=WorkerState.STARTING,
            assigned=assigned,
            held=self._nothing,
            staged=self._nothing,
            perhaps=self._nothing,
            asked_at=now,
        )
        return StartWorker(worker=worker, experts=expert_lists(assigned), node=node)

    def loads(self, info: WorkerInfo, now: float) -> bool:
        """A worker has loaded. Returns False if it was known to be loaded, or has ended."""
        record = self.get(info.worker)
        if record is None or not record.alive or record.loaded:
            return False
        held = record.assigned if info.held is None else mask_of(info.held, record.assigned.shape)
        self._set(info.worker, info=info, loaded_at=now, held=held)
        return True

    def drain(self, worker: WorkerId, now: float, *, retired: bool = False, leave_by: float | None = None) -> None:
        """The worker must leave. retired: a user named it, or its node leaves, at `leave_by` if that is known."""
        record = self._records[worker]
        since = record.draining_since if record.state is WorkerState.DRAINING else now
        self._set(
            worker,
            state=WorkerState.DRAINING,
            draining_since=since,
            retired=record.retired or retired,
            leave_by=record.leave_by if leave_by is None else leave_by,
        )

    def keep(self, worker: WorkerId) -> None:
        """A worker that was to leave stays."""
        self._set(worker, state=WorkerState.SERVING)

    def move(self, worker: WorkerId) -> None:
        """Another one is to be started in its place."""
        self._set(worker, moves=True)

    def stay(self, worker: WorkerId) -> None:
        """It does not move after all."""
        self._set(worker, moves=False)

    def stop(self, worker: WorkerId, *, lost: bool = False) -> StopWorker:
        """The worker's process is ended. lost: it has failed, and is ended in case that it still runs."""
        state = WorkerState.DEAD if lost else WorkerState.STOPPED
        self._set(worker, state=state, held=self._nothing, staged=self._nothing, perhaps=self._nothing)
        return StopWorker(worker=worker, info=self._records[worker].info)

    def forget_ended(self, in_use: Collection[WorkerId]) -> None:
        """Forget workers that have ended and are not in use, except the last few."""
        ended = [record.id for record in self._records.values() if not record.alive and record.id not in in_use]
        for worker in ended[:-ENDED_REMEMBERED]:
            del self._records[worker]

    # --- Experts ------------------------------------------------------------------------------------------------

    def stage(self, keys: Iterable[ExpertKey]) -> None:
        """These experts were brought to these workers."""
        brought: dict[WorkerId, BoolArray] = {}
        for worker, layer, expert in keys:
            brought.setdefault(worker, self._records[worker].staged.copy())[layer, expert] = True
        for worker, staged in brought.items():
            self._set(worker, staged=staged)

    def unstage(self, workers: Iterable[WorkerId]) -> None:
        """These workers drop the experts that were brought to them."""
        for worker in workers:
            self._set(worker, staged=self._nothing)

    def join(self, placement: Placement) -> None:
        """An epoch with `placement` has begun."""
        for worker in placement.workers:
            record = self._records[worker.id]
            if record.alive:
                state = WorkerState.SERVING if record.state is WorkerState.STARTING else record.state
                held = needs(placement, worker.id)
                self._set(worker.id, held=held, staged=self._nothing, perhaps=self._nothing, state=state)
                self._set(worker.id, perhaps_serves=None, failed_joins=0)

    def doubt(self, placement: Placement) -> None:
        """A worker may have begun an epoch with `placement` or not, so it holds only what it holds in both cases."""
        for worker in placement.workers:
            record, wanted = self._records[worker.id], needs(placement, worker.id)
            if record.alive:
                served = serves(placement, worker.id)
                if record.perhaps_serves is not None:
                    served = served | record.perhaps_serves
                perhaps = record.perhaps | record.has | wanted
                self._set(worker.id, held=record.held & wanted, perhaps=perhaps, perhaps_serves=served)

    # --- Signs of life ------------------------------------------------------------------------------------------

    def probe(self) -> Probe:
        self.probing = True
        return Probe(workers=self.loaded)

    def probed(self) -> None:
        """All probed workers have answered, or are known to be lost."""
        self.probing = False

    def strike(self, worker: WorkerId) -> int:
        """A step failed, and the worker is a suspect. Returns how many times in a row; 0 if the worker is gone."""
        record = self.get(worker)
        if record is None or not record.alive:
            return 0
        self._set(worker, strikes=record.strikes + 1)
        return record.strikes + 1

    def failed_to_join(self, worker: WorkerId) -> int:
        """A group with the worker could not form. Returns how many times in a row; 0 if the worker is gone."""
        record = self.get(worker)
        if record is None or not record.alive:
            return 0
        self._set(worker, failed_joins=record.failed_joins + 1)
        return record.failed_joins + 1

    def forgive(self) -> None:
        for record in self.alive:
            if record.strikes:
                self._set(record.id, strikes=0)

    def resume(self, now: float) -> list[StartWorker]:
        """Set all times by the clock of a restarted coordinator, and ask the workers that load once more."""
        commands: list[StartWorker] = []
        for record in self.alive:
            # the notice of a node's end is repeated, with the seconds that are left
            self._set(record.id, draining_since=now, leave_by=None, loaded_at=None if record.loaded_at is None else now)
            if not record.loaded:
                self._set(record.id, asked_at=now)
                commands.append(StartWorker(worker=record.id, experts=expert_lists(record.assigned)))
        return commands


def needs(placement: Placement, worker: WorkerId) -> BoolArray:
    """[L, E] the experts that `placement` puts into the device of `worker`, which must be there before it begins."""
    return _mask_of_slots(placement, worker, tier=Tier.DEVICE)


def serves(placement: Placement, worker: WorkerId) -> BoolArray:
    """[L, E] the experts that `placement` gives to `worker`, in whichever tier."""
    return _mask_of_slots(placement, worker, tier=None)


def _mask_of_slots(placement: Placement, worker: WorkerId, tier: Tier | None) -> BoolArray:
    """[L, E] the experts in the slots of `worker`, in this tier or in any."""
    rank = placement.rank_of(worker)
    begin = placement.first_slot[rank]
    mine = slice(begin, begin + placement.workers[rank].slots)
    table = placement.physical_to_logical_map[:, mine]
    chosen = table != EMPTY
    if tier is not None:
        chosen &= placement.tiers[:, mine] == tier
    layers, slots = np.nonzero(chosen)
    mask = np.zeros((placement.num_layers, placement.num_logical_experts), dtype=np.bool_)
    mask[layers, table[layers, slots]] = True
    return mask


def entries(mask: BoolArray) -> tuple[Indices, ...]:
    """What np.nonzero returns, in a tenth of its time: an array of n indices for each dimension, in their order."""
    return np.unravel_index(np.flatnonzero(mask), mask.shape)


def mask_of(experts: Sequence[Sequence[int]], shape: tuple[int, ...]) -> BoolArray:
    """[L] lists of experts, in which EMPTY counts for nothing, to an [L, E] mask."""
    mask = np.zeros(shape, dtype=np.bool_)
    for layer, row in enumerate(experts):
        mask[layer, [e for e in row if e != EMPTY]] = True
    return mask


def expert_lists(wanted: BoolArray) -> tuple[tuple[int, ...], ...]:
    """[L, E] mask to [L] lists of experts."""
    layers, experts = entries(wanted)
    ends = np.searchsorted(layers, np.arange(len(wanted)), side="right").tolist()
    numbers = experts.tolist()
    return tuple(tuple(numbers[begin:end]) for begin, end in pairwise([0, *ends]))
