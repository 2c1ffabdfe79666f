"""The life of a change: alone, and in a pretended cluster."""

import numpy as np
import pytest

from elastic_moe.cluster.control.change import MAX_BACKOFF_S, STABLE_S, Epochs
from elastic_moe.cluster.facts.counters import ClusterCounters
from elastic_moe.cluster.facts.events import (
    Abandon,
    AbortSteps,
    Command,
    Commit,
    CommitFailed,
    Committed,
    Prepare,
    Prepared,
    RebalanceRequested,
    ScaleRequested,
    Solve,
    StepFailed,
    Tick,
    Transfer,
    TransferDone,
    WorkerLost,
)
from elastic_moe.cluster.facts.facts import Cause, ControlSettings, Outage, Stage
from elastic_moe.cluster.facts.membership import Membership, needs
from elastic_moe.cluster.facts.operations import OperationLog
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.views import OperationKind, Phase
from elastic_moe.cluster.placement import WorkerId
from tests.cluster.simulation import EXPERTS, LAYERS, info
from tests.cluster.stories import IDLE, W0, W1, newest, placement_of, sent, serving, spec_of


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_death_during_a_rebalance_rolls_it_back_and_recovers(stage: int) -> None:
    """While transferring, preparing, committing."""
    sim = serving(3, interval_s=5.0)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    sim.now += 10
    sim.feed(Tick())
    rebalance = newest(sim).operation_id
    sim.finish(0)
    for _ in range(stage):
        sim.finish(0)
    sim.kill(W1)
    if stage < 2:
        sim.feed(WorkerLost(worker=W1, reason="died"))
    sim.settle()
    operation = sim.state.operations.get(rebalance)
    assert operation is not None
    assert operation.phase is Phase.FAILED
    assert sent(sim, Abandon)[0].epoch == operation.epoch
    assert sim.state.counters.rebalances["failed"] == 1
    assert W1 not in sim.facts.ranks


def test_a_worker_dies_in_the_flip_unnoticed_by_the_engine() -> None:
    sim = serving(3)
    sim.feed(ScaleRequested(workers=2))
    sim.feed(IDLE)
    while not any(isinstance(command, Commit) for command in sim.todo):
        sim.finish(0)
    sim.feed(WorkerLost(worker=W0, reason="died"))
    assert sim.facts.change is not None
    sim.workers[W0].alive = True
    sim.finish(0)
    assert not sim.state.readiness().ready
    sim.workers[W0].alive = False
    sim.settle()
    assert W0 not in sim.facts.ranks


def test_after_a_failed_flip_only_experts_held_in_both_epochs_count() -> None:
    sim = serving(2)
    sim.feed(RebalanceRequested(planner="auto"))
    while not any(isinstance(command, Commit) for command in sim.todo):
        sim.finish(0)
    (commit,) = sim.todo
    sim.todo.clear()
    sim.feed(CommitFailed(epoch=commit.spec.epoch, reason="w1: no answer"))
    assert not sim.state.readiness().ready
    assert sim.facts.change is None
    for worker in (W0, W1):
        assert (sim.facts.records[worker].held <= sim.workers[worker].held).all()
    sim.settle()


def test_a_failed_copy_is_read_from_the_checkpoint_the_next_time() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=3))
    while not any(isinstance(command, Transfer) for command in sim.todo):
        sim.finish(0)
        sim.now += 1
        sim.feed(Tick())
    sim.finish(0, fault=True)
    assert newest(sim).error == "a copy failed"
    sim.settle()
    assert sent(sim, Transfer)[-1].copies == ()
    assert newest(sim).phase is Phase.COMPLETED
    assert newest(sim).error is None


def test_rebalance_keeps_the_group_and_moves_only_what_is_missing() -> None:
    sim = serving(2)
    assert sim.facts.spec is not None
    before = sim.facts.spec
    sim.feed(RebalanceRequested(planner="greedy"))
    (solve,) = sent(sim, Solve)
    assert solve.planner == "greedy"
    sim.settle()
    assert sim.facts.spec.group == before.group
    (transfer,) = sent(sim, Transfer)
    after = sim.facts.spec.placement
    missing = [needs(after, w) & ~needs(before.placement, w) for w in (W0, W1)]
    assert len(transfer.copies) == sum(int(mask.sum()) for mask in missing) > 0
    assert newest(sim).phase is Phase.COMPLETED
    assert sim.state.counters.experts_moved == len(transfer.copies)
    assert sim.state.counters.bytes_moved == 1000 * len(transfer.copies)


def test_requests_that_had_to_move_are_counted() -> None:
    sim = serving(2)
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    while not isinstance(sim.todo[0], Commit):
        sim.finish(0)
    commit = sim.todo.pop(0)
    assert isinstance(commit, Commit)
    sim.feed(Committed(epoch=commit.spec.epoch, moved_requests=3))
    assert sim.state.counters.requests_moved == 3


def test_recoveries_and_stages_are_counted() -> None:
    sim = serving(2)
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    sim.now += 2.0
    sim.settle()
    sim.feed(StepFailed(epoch=sim.facts.epoch, suspects=(), reason="aborted"))
    sim.settle()
    # an engine sees the step fail before anybody knows why
    sim.feed(StepFailed(epoch=sim.facts.epoch, suspects=(W0,), reason="the connection has ended"))
    sim.kill(W0)
    sim.settle()
    counters = sim.state.counters
    assert (counters.recoveries["worker"], counters.recoveries["step"]) == (2, 1)
    assert sum(counters.recovery_s.counts) == 3
    assert counters.recovery_s.total_s >= 2.0
    sim.feed(RebalanceRequested(planner="auto"))
    sim.settle()
    assert [sum(d.counts) for d in counters.rebalance_s.values()] == [1, 1, 1, 1]


# --- Epochs alone -------------------------------------------------------------------------------------------------


class Alone:
    """Epochs with the owners that it tells of what it does, and two workers that have loaded every expert."""

    def __init__(self, workers: int = 2) -> None:
        self.membership = Membership((LAYERS, EXPERTS))
        self.operations = OperationLog()
        self.counters = ClusterCounters()
        self.epochs = Epochs(ControlSettings(workers=workers), self.membership, self.operations, self.counters)
        for _ in range(workers):
            start = self.membership.start(np.ones((LAYERS, EXPERTS), dtype=bool), 0.0)
            self.membership.loads(info(start.worker), 0.0)

    def begin(self, kind: OperationKind, *workers: WorkerId, now: float = 0.0) -> list[Command]:
        operation = self.operations.open(kind, self.epochs.next_epoch, "for a test")
        return self.epochs.begin(operation, placement_of(*workers), now)

    def serve(self, *workers: WorkerId) -> None:
        self.begin(OperationKind.START, *workers)
        self.pass_through(now=0.0)

    def pass_through(self, now: float) -> None:
        (prepare,) = self.epochs.prepare(now)
        assert isinstance(prepare, Prepare)
        self.epochs.prepared(Prepared(spec=prepare.spec), now)
        change, _ = self.epochs.flip(now)
        self.operations.complete(change.operation_id, "done")


def test_a_change_in_which_nothing_is_missing_waits_only_for_those_that_leave() -> None:
    alone = Alone()
    assert alone.begin(OperationKind.START, W0, W1) == []
    assert alone.epochs.change is not None
    assert alone.epochs.change.stage is Stage.DRAINING
    alone.pass_through(now=3.0)
    assert (alone.epochs.ranks, alone.epochs.since, alone.epochs.next_epoch) == ((W0, W1), 3.0, 2)
    assert not alone.membership[W0].held[:, 4:].any(), "it holds what the placement gives it, and no more"


def test_answers_to_an_earlier_attempt_are_ignored() -> None:
    alone = Alone()
    alone.serve(W0)
    alone.begin(OperationKind.SCALE, W0, W1)
    alone.epochs.give_up("a peer did not come", 1.0)
    alone.begin(OperationKind.SCALE, W0, W1)
    late, current = Epoch(2), Epoch(3)
    assert alone.epochs.is_current(current, Stage.DRAINING)
    assert not alone.epochs.is_current(late, Stage.DRAINING)
    assert alone.epochs.transferred(TransferDone(epoch=late, nbytes=1), 2.0) == []
    assert alone.epochs.prepared(Prepared(spec=spec_of(W0, W1, epoch=late)), 2.0) == []
    assert alone.epochs.change is not None
    assert (alone.epochs.change.stage, alone.epochs.change.nbytes) == (Stage.DRAINING, 0)


@pytest.mark.parametrize(
    ("kind", "phase", "pause_s"),
    [(OperationKind.REBALANCE, Phase.FAILED, 0.2), (OperationKind.SCALE, Phase.PREPARING, 0.2)],
)
def test_a_change_that_is_given_up_fails_only_a_rebalance(kind: OperationKind, phase: Phase, pause_s: float) -> None:
    alone = Alone()
    alone.serve(W0, W1)
    alone.begin(kind, W1, W0)
    operation = alone.operations.find_open(kind)
    assert operation is not None
    alone.epochs.prepare(1.0)
    commands = alone.epochs.give_up("a peer did not come", 1.0)
    assert commands == [Abandon(epoch=Epoch(2), workers=(W1, W0))]
    ended = alone.operations.get(operation.operation_id)
    assert ended is not None
    assert (ended.phase, ended.error) == (phase, "a peer did not come")
    assert alone.epochs.retry_at == 1.0 + pause_s
    assert alone.epochs.change is None


def test_pauses_double_up_to_a_limit_and_are_forgotten() -> None:
    alone = Alone()
    alone.serve(W0, W1)
    pauses = []
    for _ in range(12):
        alone.begin(OperationKind.REBALANCE, W1, W0)
        alone.epochs.give_up("no", 0.0)
        pauses.append(alone.epochs.retry_at)
    assert pauses[:3] == [0.2, 0.4, 0.8]
    assert pauses[-1] == MAX_BACKOFF_S
    assert not alone.epochs.is_stable(STABLE_S - 0.1)
    assert alone.epochs.is_stable(STABLE_S)
    alone.epochs.forgive(STABLE_S - 0.1)
    alone.begin(OperationKind.REBALANCE, W1, W0)
    alone.epochs.give_up("no", 0.0)
    assert alone.epochs.retry_at == MAX_BACKOFF_S, "the last failure was less than STABLE_S ago"
    alone.epochs.forgive(STABLE_S)
    alone.begin(OperationKind.REBALANCE, W1, W0)
    alone.epochs.give_up("no", 0.0)
    assert alone.epochs.retry_at == 0.2


def test_the_first_cause_of_an_outage_counts_unless_a_death_explains_it() -> None:
    alone = Alone()
    alone.serve(W0, W1)
    (abort,) = alone.epochs.fail("a step failed", Cause.STEP, 5.0)
    assert abort == AbortSteps(epochs=(Epoch(1),), workers=(W0, W1))
    alone.epochs.fail("worker w1 lost", Cause.WORKER, 6.0)
    alone.epochs.fail("the engine is lost", Cause.ENGINE, 7.0)
    assert alone.epochs.outage == Outage(reason="a step failed", cause=Cause.WORKER, since=5.0)
    recovery = alone.operations.find_open(OperationKind.RECOVER)
    assert recovery is not None
    assert recovery.reason == "a step failed"


def test_a_flip_that_failed_leaves_what_is_held_either_way() -> None:
    alone = Alone()
    alone.serve(W0, W1)
    alone.begin(OperationKind.REBALANCE, W1, W0)
    assert alone.epochs.change is not None
    spec = alone.epochs.change.spec
    alone.membership.stage((w, layer, e) for w in (W0, W1) for layer in range(LAYERS) for e in range(EXPERTS))
    alone.epochs.prepare(1.0)
    alone.epochs.prepared(Prepared(spec=spec), 1.0)
    alone.epochs.commit_failed("w1: no answer", 1.0)
    assert not any(alone.membership[w].has.any() for w in (W0, W1))
    assert alone.epochs.outage is not None
    assert alone.epochs.outage.cause is Cause.FLIP


def test_a_worker_that_died_in_the_flip_breaks_the_epoch_that_it_has_begun() -> None:
    alone = Alone()
    alone.begin(OperationKind.START, W0, W1)
    alone.membership.stop(W1)
    alone.pass_through(now=1.0)
    assert isinstance(alone.epochs.look_back(1.0)[0], AbortSteps)
    assert alone.epochs.outage == Outage(reason="worker w1 was lost during the flip", cause=Cause.WORKER, since=1.0)
