"""Workers as the control plane knows them. `Membership` owns every fact about them.

Legend: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.facts.events import ExpertKey, Probe, StartWorker, StopWorker
from elastic_moe.cluster.messages.epochs import HostInfo
from elastic_moe.cluster.messages.views import WorkerState
from elastic_moe.cluster.placement import EMPTY, Placement, WorkerId

BoolArray = npt.NDArray[np.bool_]

DEAD_REMEMBERED = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """A worker from the moment it is asked for. `held` and `staged` may understate, never overstate."""

    id: WorkerId
    state: WorkerState
    assigned: BoolArray
    """[L, E] what it is to load when it starts."""
    held: BoolArray
    """[L, E] what it holds under the epoch in force."""
    staged: BoolArray
    """[L, E] what was brought to it since."""
    asked_at: float
    info: HostInfo | None = None
    loaded_at: float | None = None
    retired: bool = False
    """It leaves because it was named, and not for the number's sake."""
    draining_since: float = 0.0
    strikes: int = 0
    """Steps in a row that failed with it as a suspect."""

    @property
    def alive(self) -> bool:
        return self.state is not WorkerState.DEAD

    @property
    def loaded(self) -> bool:
        return self.alive and self.info is not None

    @property
    def has(self) -> BoolArray:
        return self.held | self.staged

    @property
    def capacity(self) -> int | None:
        """Experts that it has memory for, over all layers; None where that is not limited, or not known yet."""
        return None if self.info is None else self.info.expert_capacity


class Membership:
    """Every worker from the moment it is asked for until it is forgotten, in the order in which they were asked for."""

    def __init__(self, shape: tuple[int, int]) -> None:
        """shape: (L, E)."""
        self._nothing: BoolArray = np.zeros(shape, dtype=np.bool_)
        self._nothing.setflags(write=False)
        self._members: dict[WorkerId, Member] = {}
        self._asked = 0
        self.probing = False
        """Whether workers are being asked for a sign of life."""

    @property
    def members(self) -> dict[WorkerId, Member]:
        """A copy, as things are now."""
        return dict(self._members)

    @property
    def alive(self) -> list[Member]:
        return [member for member in self._members.values() if member.alive]

    @property
    def loaded(self) -> tuple[WorkerId, ...]:
        return tuple(member.id for member in self.alive if member.loaded)

    @property
    def next_worker(self) -> WorkerId:
        return WorkerId(f"w{self._asked}")

    def get(self, worker: WorkerId) -> Member | None:
        return self._members.get(worker)

    def __getitem__(self, worker: WorkerId) -> Member:
        return self._members[worker]

    def _set(self, worker: WorkerId, **facts: Any) -> None:
        self._members[worker] = replace(self._members[worker], **facts)

    # --- Coming and going ---------------------------------------------------------------------------------------

    def start(self, assigned: BoolArray, now: float) -> StartWorker:
        """Ask for one more worker, which is to load `assigned` ([L, E])."""
        worker = self.next_worker
        self._asked += 1
        self._members[worker] = Member(
            id=worker,
            state=WorkerState.STARTING,
            assigned=assigned,
            held=self._nothing,
            staged=self._nothing,
            asked_at=now,
        )
        return StartWorker(worker=worker, experts=expert_lists(assigned))

    def loads(self, info: HostInfo, now: float) -> bool:
        """A worker has loaded. False where that is no news of a worker that was waited for."""
        member = self.get(info.worker)
        if member is None or not member.alive or member.loaded:
            return False
        self._set(info.worker, info=info, loaded_at=now, held=member.assigned)
        return True

    def drain(self, worker: WorkerId, now: float, *, retired: bool = False) -> None:
        """It is to leave. retired: because it was named."""
        member = self._members[worker]
        self._set(worker, state=WorkerState.DRAINING, draining_since=now, retired=member.retired or retired)

    def keep(self, worker: WorkerId) -> None:
        """It is not to leave after all."""
        self._set(worker, state=WorkerState.SERVING)

    def stop(self, worker: WorkerId) -> StopWorker:
        self._set(worker, state=WorkerState.DEAD, held=self._nothing, staged=self._nothing)
        return StopWorker(worker=worker, info=self._members[worker].info)

    def forget_dead(self, in_use: Collection[WorkerId]) -> None:
        """All but the last few that are members of nothing."""
        dead = [member.id for member in self._members.values() if not member.alive and member.id not in in_use]
        for worker in dead[:-DEAD_REMEMBERED]:
            del self._members[worker]

    # --- Experts ------------------------------------------------------------------------------------------------

    def stage(self, keys: Iterable[ExpertKey]) -> None:
        """These experts were brought."""
        brought: dict[WorkerId, BoolArray] = {}
        for worker, layer, expert in keys:
            brought.setdefault(worker, self._members[worker].staged.copy())[layer, expert] = True
        for worker, staged in brought.items():
            self._set(worker, staged=staged)

    def unstage(self, workers: Iterable[WorkerId]) -> None:
        """What was brought to them is dropped again."""
        for worker in workers:
            self._set(worker, staged=self._nothing)

    def join(self, placement: Placement) -> None:
        """An epoch with `placement` has begun."""
        for worker in placement.workers:
            member = self._members[worker.id]
            if member.alive:
                state = WorkerState.SERVING if member.state is WorkerState.STARTING else member.state
                self._set(worker.id, held=needs(placement, worker.id), staged=self._nothing, state=state)

    def doubt(self, placement: Placement) -> None:
        """Some may have begun an epoch with `placement`, others not: count on what each holds either way."""
        for worker in placement.workers:
            self._set(worker.id, held=self._members[worker.id].held & needs(placement, worker.id))

    # --- Signs of life ------------------------------------------------------------------------------------------

    def probe(self) -> Probe:
        self.probing = True
        return Probe(workers=self.loaded)

    def probed(self) -> None:
        """All have answered, or are known to be lost."""
        self.probing = False

    def strike(self, worker: WorkerId) -> int:
        """A step failed with it as a suspect. Returns how many in a row; 0 for one that is not there."""
        member = self.get(worker)
        if member is None or not member.alive:
            return 0
        self._set(worker, strikes=member.strikes + 1)
        return member.strikes + 1

    def forgive(self) -> None:
        for member in self.alive:
            if member.strikes:
                self._set(member.id, strikes=0)

    def resume(self, now: float) -> list[StartWorker]:
        """The clock is another one, and answers are lost: those that load are asked again."""
        commands: list[StartWorker] = []
        for member in self.alive:
            self._set(member.id, draining_since=now, loaded_at=None if member.loaded_at is None else now)
            if not member.loaded:
                self._set(member.id, asked_at=now)
                commands.append(StartWorker(worker=member.id, experts=expert_lists(member.assigned)))
        return commands


def needs(placement: Placement, worker: WorkerId) -> BoolArray:
    """[L, E] the experts that `placement` gives to `worker`."""
    wanted = np.zeros((placement.num_layers, placement.num_logical_experts), dtype=np.bool_)
    for layer in range(placement.num_layers):
        wanted[layer, [e for e in placement.experts_of(worker, layer) if e != EMPTY]] = True
    return wanted


def expert_lists(wanted: BoolArray) -> tuple[tuple[int, ...], ...]:
    """[L, E] mask to [L] lists of experts."""
    return tuple(tuple(int(e) for e in np.nonzero(row)[0]) for row in wanted)
