"""How the tests of the control plane begin, and what they look at: a pretended cluster that serves, or bare facts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from elastic_moe.cluster.facts.events import Command, LoadSeen, Reconfigured, Tick
from elastic_moe.cluster.facts.facts import ControlSettings, Facts
from elastic_moe.cluster.facts.membership import WorkerRecord, needs
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec
from elastic_moe.cluster.messages.views import Operation, WorkerState
from elastic_moe.cluster.placement import Placement, Worker, WorkerId, contiguous
from tests.cluster.simulation import EXPERTS, LAYERS, MODEL, Simulation, info

W0, W1, W2 = WorkerId("w0"), WorkerId("w1"), WorkerId("w2")

IDLE = LoadSeen(waiting=0, running=0, kv_usage=0.0)

PART = LAYERS * EXPERTS // 2
"""Experts that half of the workers needed have memory for."""


def serving(workers: int, **settings: float) -> Simulation:
    sim = Simulation(workers=workers, **settings)  # type: ignore[arg-type]
    sim.feed(Tick())
    sim.settle()
    sim.log.clear()
    return sim


def redeployed(**settings: Any) -> Reconfigured:
    defaults = {"workers": 2, "min_workers": None, "max_workers": None, "autoscale_window_s": 15.0}
    return Reconfigured(**{**defaults, "rebalance_interval_s": 0.0, "drain_timeout_s": 30.0, **settings})


def newest(sim: Simulation) -> Operation:
    return sim.state.operations.all()[0]


def sent(sim: Simulation, kind: type) -> list[Command]:
    return [command for command in sim.log if isinstance(command, kind)]


def placement_of(*workers: WorkerId) -> Placement:
    """Experts in order, over as many slots as they need."""
    slots = -(-EXPERTS // len(workers))
    return contiguous(LAYERS, EXPERTS, [Worker(id=worker, node="n0", slots=slots) for worker in workers])


def spec_of(*workers: WorkerId, epoch: int = 1) -> EpochSpec:
    return EpochSpec(
        epoch=Epoch(epoch), placement=placement_of(*workers), group="emoe-1", transport="shm", rendezvous=""
    )


def member(
    worker: WorkerId,
    state: WorkerState = WorkerState.SERVING,
    *,
    loaded_at: float | None = 0.0,
    capacity: int | None = None,
    disk: float | None = None,
    **facts: Any,
) -> WorkerRecord:
    """loaded_at: None for one that still loads. Unless given, it holds nothing."""
    nothing = np.zeros((LAYERS, EXPERTS), dtype=bool)
    return WorkerRecord(
        **{
            "id": worker,
            "state": state,
            "assigned": nothing,
            "held": nothing,
            "staged": nothing,
            "perhaps": nothing,
            "asked_at": 0.0,
            "loaded_at": loaded_at,
            "info": None if loaded_at is None else info(worker, capacity=capacity, disk=disk),
            **facts,
        }
    )


def facts_of(members: Sequence[WorkerRecord] = (), ranks: Sequence[WorkerId] = (), **facts: Any) -> Facts:
    """Facts of a cluster in which nothing is under way. ranks: members of the epoch in force; none before the first."""
    spec = spec_of(*ranks) if ranks else None
    settings = ControlSettings(workers=max(1, len(members)))
    return Facts(
        **{
            "settings": settings,
            "model": MODEL,
            "records": {m.id: m for m in members},
            "probing": False,
            "busy": None,
            "spec": spec,
            "goal": None if spec is None else spec.placement,
            "epoch_since": 0.0,
            "outage": None,
            "change": None,
            "next_epoch": Epoch(2 if ranks else 1),
            "planning": None,
            "pinned": False,
            "pins": None,
            "target": settings.workers,
            "load": np.zeros((LAYERS, EXPERTS), dtype=np.int64),
            "retry_at": 0.0,
            "start_at": 0.0,
            "fatal": None,
            **facts,
        }
    )


def team(*workers: WorkerId, **facts: Any) -> Facts:
    """Facts of a cluster in which these serve, each with its part of the experts."""
    placement = placement_of(*workers)
    return facts_of([member(worker, held=needs(placement, worker)) for worker in workers], workers, **facts)
