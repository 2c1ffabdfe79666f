"""A cluster that only pretends: ControlState's commands, carried out by simulated workers, in any order."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import numpy as np

from elastic_moe.cluster.control.state import ControlState
from elastic_moe.cluster.facts.events import (
    Abandon,
    AbortSteps,
    Command,
    Commit,
    CommitFailed,
    Committed,
    Drain,
    EngineLost,
    Event,
    LoadSeen,
    PlanReady,
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Probed,
    Resumed,
    RoutingCounted,
    Solve,
    StartWorker,
    StopWorker,
    Tick,
    Transfer,
    TransferDone,
    TransferFailed,
    Weigh,
    Weighed,
    WorkerFailed,
    WorkerLoaded,
    WorkerLost,
)
from elastic_moe.cluster.facts.facts import ControlSettings, Facts
from elastic_moe.cluster.facts.membership import mask_of, needs, serves
from elastic_moe.cluster.facts.tiering import memory_of, pins_of
from elastic_moe.cluster.messages.epochs import Epoch, EpochSpec, ModelInfo, WorkerInfo
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.placement import Placement, WorkerId
from tests.cluster.invariants import validate

LAYERS, EXPERTS = 3, 8

MODEL = ModelInfo(
    architecture="Fake",
    num_layers=LAYERS,
    num_logical_experts=EXPERTS,
    top_k=2,
    hidden_size=4,
    vocab_size=8,
    max_model_len=64,
    expert_bytes=1000,
    trunk_bytes=1,
    eos_token_ids=(0,),
    dtype="float32",
)


@dataclass
class SimulatedWorker:
    """What a worker really holds, which the state may understate but never overstate."""

    held: np.ndarray
    alive: bool = True
    apart: bool = False
    """It answers the coordinator, and no other worker reaches it."""
    loaded: np.ndarray = field(init=False)
    """What it held when it had loaded."""
    placed: np.ndarray | None = None
    """What lies in its device under the epoch in force, and (below) what it serves."""
    serves: np.ndarray | None = None
    epoch: int = 0
    prepared: dict[int, EpochSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loaded = self.held.copy()


class Simulation:
    def __init__(
        self,
        *,
        workers: int,
        redundant: int = 0,
        interval_s: float = 0.0,
        seed: int = 0,
        most: int | None = None,
        capacity: int | None = None,
        disk: float | None = None,
        drain_timeout_s: float = 30.0,
        nodes: bool = False,
        least: int | None = None,
    ) -> None:
        """capacity: experts that each host has memory for, over all layers. disk: bytes/s of its disk tier, if any.
        nodes: each worker has a node of its own, called n0 for w0; else all are on n0."""
        self.now = 0.0
        self.rng = np.random.default_rng(seed)
        self.state = ControlState(
            ControlSettings(
                workers=workers,
                redundant_experts=redundant,
                rebalance_interval_s=interval_s,
                min_workers=least,
                max_workers=most,
                drain_timeout_s=drain_timeout_s,
            ),
            MODEL,
        )
        self.capacity, self.disk = capacity, disk
        self.nodes = nodes
        self.draining: tuple[WorkerId, ...] = ()
        self.workers: dict[WorkerId, SimulatedWorker] = {}
        self.todo: list[Command] = []
        self.log: list[Command] = []
        self.engine_epoch = 0

    def feed(self, event: Event) -> None:
        commands = self.state.handle(event, self.now)
        self.log += commands
        validate(self.state)
        for command in commands:
            self._at_once(command)

    @property
    def facts(self) -> Facts:
        return self.state.facts

    def count(self, load: np.ndarray) -> None:
        """load: [L, E] of the window of routing statistics."""
        self.feed(RoutingCounted(load=load))

    def _at_once(self, command: Command) -> None:
        match command:
            case StartWorker():
                # one that is asked again after a restart of the coordinator goes on loading
                if command.worker not in self.workers or not self.workers[command.worker].alive:
                    self.workers[command.worker] = SimulatedWorker(mask_of(self._loads(command), (LAYERS, EXPERTS)))
                self.todo.append(command)
            case AbortSteps():
                pass
            case Drain():
                self.draining = command.workers
            case StopWorker():
                self.workers[command.worker].alive = False
            case Abandon():
                for worker in command.workers:
                    simulated = self.workers[worker]
                    simulated.prepared.pop(command.epoch, None)
                    simulated.held &= simulated.loaded if simulated.placed is None else simulated.placed
            case _:
                self.todo.append(command)

    def kill(self, worker: WorkerId) -> None:
        """Nobody is told."""
        self.workers[worker].alive = False

    def finish(self, index: int, *, fault: bool = False) -> None:
        """Carry out one of the commands that are under way; `fault`: it goes wrong for no reason of a worker's."""
        command = self.todo.pop(index)
        match command:
            case StartWorker():
                self._load(command, fault)
            case Transfer():
                self._transfer(command, fault)
            case Prepare():
                self._prepare(command, fault)
            case Commit():
                self._commit(command, fault)
            case Probe():
                self.feed(Probed(lost=tuple((w, "no answer") for w in command.workers if not self.workers[w].alive)))
            case Solve():
                self._solve(command, fault)
            case Weigh():
                prices = self.rng.uniform(0.9, 1.1, len(command.before))
                self.feed(Weighed(ticket=command.ticket, present_s=1.0, before_s=tuple(prices), tokens=100))

    def _loads(self, command: StartWorker) -> list[tuple[int, ...]]:
        """What a host holds of the experts that it is asked to load."""
        limit = EXPERTS if self.disk is None or self.capacity is None else self.capacity // LAYERS
        return [experts if len(experts) <= limit else experts[: pins_of(limit)] for experts in command.experts]

    def _load(self, command: StartWorker, fault: bool) -> None:
        if not self.workers[command.worker].alive:
            self.feed(WorkerLost(worker=command.worker, reason="died"))
        elif fault:
            self.feed(WorkerFailed(worker=command.worker, reason="out of memory"))
        else:
            held = None if self.disk is None else tuple(self._loads(command))
            node = command.node or (node_of(command.worker) if self.nodes else "n0")
            self.feed(WorkerLoaded(info=info(command.worker, node, capacity=self.capacity, disk=self.disk, held=held)))

    def _find_lost(self, workers: list[WorkerId]) -> None:
        for worker in workers:
            if not self.workers[worker].alive:
                self.feed(WorkerLost(worker=worker, reason="died"))

    def _transfer(self, command: Transfer, fault: bool) -> None:
        staged = []
        change = self.facts.change
        if change is None or change.spec.epoch != command.epoch:
            # a transfer that was given up stops before its next expert
            self.feed(TransferFailed(epoch=command.epoch, reason="superseded"))
            return
        failed = fault
        for move in command.copies:
            source, target = self.workers[move.source], self.workers[move.target]
            if not (source.alive and target.alive) or (fault and self.rng.random() < 0.5):
                failed = True
                continue
            assert source.held[move.layer, move.expert], f"{move.source} was said to hold what it does not: {move}"
            target.held[move.layer, move.expert] = True
            staged.append((move.target, move.layer, move.expert))
        for worker, layer, expert in command.reads:
            if not self.workers[worker].alive or (fault and self.rng.random() < 0.5):
                failed = True
                continue
            self.workers[worker].held[layer, expert] = True
            staged.append((worker, layer, expert))
        for worker, _, _ in staged:
            self._check_memory(worker)
        if failed:
            touched = {m.source for m in command.copies} | {m.target for m in command.copies}
            self._find_lost(sorted(touched | {w for w, _, _ in command.reads}))
            self.feed(TransferFailed(epoch=command.epoch, reason="a copy failed", staged=tuple(staged)))
        else:
            self.feed(TransferDone(epoch=command.epoch, nbytes=1000 * len(staged)))

    def _check_memory(self, worker: WorkerId) -> None:
        """Beside what lies in the device there is a slot for the other experts of each layer, if there are others."""
        host = self.workers[worker]
        if self.capacity is not None and self.disk is not None:
            served = host.held if host.serves is None else host.serves
            assert memory_of(host.held, served) <= self.capacity, f"{worker} was given more than its device holds"

    def _prepare(self, command: Prepare, fault: bool) -> None:
        members = [w.id for w in command.spec.placement.workers]
        change = self.facts.change
        stale = change is None or change.spec.epoch != command.spec.epoch
        for worker in members:
            simulated = self.workers[worker]
            if simulated.alive and not stale:
                missing = needs(command.spec.placement, worker) & ~simulated.held
                assert not missing.any(), f"{worker} was told to prepare what it does not hold"
                simulated.prepared[command.spec.epoch] = command.spec
        apart = command.forms_group and len(members) > 1 and any(self.workers[w].apart for w in members)
        if fault or apart or not all(self.workers[w].alive for w in members):
            self._find_lost(members)
            self.feed(PrepareFailed(epoch=command.spec.epoch, reason="a peer did not come"))
        else:
            self.feed(Prepared(spec=command.spec))

    def _commit(self, command: Commit, fault: bool) -> None:
        """A fault leaves some workers in the new epoch and others in the old one."""
        members = [w.id for w in command.spec.placement.workers]
        failed = fault
        for worker in members:
            simulated = self.workers[worker]
            if not simulated.alive or (fault and self.rng.random() < 0.5):
                failed = True
                continue
            self._flip(worker, command.spec)
        if failed:
            self._find_lost(members)
            self.feed(CommitFailed(epoch=command.spec.epoch, reason="not every worker flipped"))
        else:
            self.engine_epoch = command.spec.epoch
            self.feed(Committed(epoch=command.spec.epoch))

    def _solve(self, command: Solve, fault: bool) -> None:
        spec = self.facts.spec
        assert spec is not None
        placement = None if fault else shuffled(spec.placement, self.rng)
        self.feed(PlanReady(ticket=command.ticket, placement=placement, worthwhile=True, no_worse=True, reason="drawn"))

    def lose_engine(self) -> None:
        self.todo = [command for command in self.todo if not isinstance(command, Commit)]
        self.draining = ()
        self.feed(EngineLost(reason="died"))

    def restart_coordinator(self, *, flipped: float) -> None:
        """It is killed and goes on from what it saved; `flipped`: how far a flip under way gets, 0 to 1."""
        for command in self.todo:
            if isinstance(command, Commit):
                members = [worker.id for worker in command.spec.placement.workers]
                reached = members[: round(flipped * len(members))]
                for worker in reached:
                    self._flip(worker, command.spec)
                if len(reached) == len(members) and all(self.workers[w].alive for w in members):
                    self.engine_epoch = command.spec.epoch
        self.todo.clear()
        self.state = pickle.loads(pickle.dumps(self.state))
        self.feed(Resumed(engine_epoch=Epoch(self.engine_epoch)))

    def _flip(self, worker: WorkerId, spec: EpochSpec) -> None:
        host = self.workers[worker]
        host.epoch = spec.epoch
        host.placed = needs(spec.placement, worker)
        host.serves = serves(spec.placement, worker)
        host.held = host.held & host.placed
        host.prepared.clear()
        if host.alive:
            self._check_memory(worker)

    def settle(self, *, rounds: int = 200) -> None:
        """No more faults: everything under way ends, requests too, time passes, the dead are found."""
        for _ in range(rounds):
            while self.todo:
                self.finish(0)
            self._find_lost([m.id for m in self.facts.loaded])
            self.now += 1.0
            if not self.facts.target:
                # workers rest only once the engine says that they run nothing
                self.feed(LoadSeen(waiting=0, running=0, kv_usage=0.0, busy=()))
            self.feed(Tick())
            if self.facts.fatal or (not self.todo and self.settled):
                return
        raise AssertionError(f"not settled: {self.state.readiness()}")

    @property
    def settled(self) -> bool:
        facts = self.facts
        serves = facts.serves and len(facts.ranks) == facts.target
        if facts.rests and not facts.target:
            return not any(worker.alive for worker in self.workers.values())
        reached = facts.spec is not None and facts.goal == facts.spec.placement
        return serves and reached and facts.change is None and self.state.operations.find_open() is None


def node_of(worker: WorkerId) -> str:
    """The node of a worker that has one of its own."""
    return worker.replace("w", "n")


def info(
    worker: WorkerId,
    node: str = "n0",
    capacity: int | None = None,
    disk: float | None = None,
    held: tuple[tuple[int, ...], ...] | None = None,
) -> WorkerInfo:
    return WorkerInfo(
        worker=worker,
        node=node,
        endpoint=Endpoint(address="127.0.0.1", port=1, token=""),
        pid=1,
        device="cpu",
        num_kv_blocks=10,
        memory_bytes=1,
        expert_capacity=capacity,
        disk_bytes_per_s=disk,
        held=held,
    )


def shuffled(placement: Placement, rng: np.random.Generator) -> Placement:
    """Every layer's experts dealt anew. Slots of one worker differ, since the deal is a permutation of experts."""
    rows = []
    for _ in range(placement.num_layers):
        row = np.full(placement.num_slots, -1)
        row[:EXPERTS] = rng.permutation(EXPERTS)
        rows.append(row)
    return Placement(num_logical_experts=EXPERTS, workers=placement.workers, physical_to_logical_map=np.array(rows))
