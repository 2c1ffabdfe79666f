"""Workers that leave."""

import numpy as np
import pytest

from elastic_moe.cluster.control.draining import FLIP_S, Draining, drained, leaving
from elastic_moe.cluster.facts.events import (
    Commit,
    Drain,
    LoadSeen,
    NodesDrain,
    PlaceRequested,
    Prepare,
    RebalanceRequested,
    ScaleRequested,
    StartWorker,
    StopWorker,
    SubjectChanged,
    Tick,
    Transfer,
    WorkerLost,
)
from elastic_moe.cluster.facts.facts import Cause, Change, Facts, Outage, Stage
from elastic_moe.cluster.facts.transfers import Transfers
from elastic_moe.cluster.messages.views import OperationKind, Phase, WorkerState
from tests.cluster.simulation import EXPERTS, LAYERS, info, shuffled
from tests.cluster.stories import IDLE, W0, W1, W2, facts_of, member, newest, placement_of, sent, serving, spec_of


def test_scale_down_copies_before_it_stops() -> None:
    sim = serving(3)
    sim.feed(ScaleRequested(retire=(W0,)))
    sim.feed(IDLE)
    assert sim.state.readiness().ready
    kinds = []
    while sim.todo:
        kinds.append(type(sim.todo[0]))
        assert not sent(sim, StopWorker)
        sim.finish(0)
    assert kinds == [Transfer, Prepare, Commit]
    assert sent(sim, StopWorker) == [StopWorker(worker=W0, info=info(W0))]
    assert not any(transfer.reads for transfer in sent(sim, Transfer))
    assert sim.facts.ranks == (W1, W2)


def test_a_worker_that_leaves_gets_no_requests_and_may_finish_those_it_has() -> None:
    sim = serving(3, drain_timeout_s=20.0)
    sim.feed(ScaleRequested(retire=(W0,)))
    assert sim.draining == (W0,)
    sim.finish(0)
    for busy in ((W0, W1), (W0,), (W1,)):
        assert not sent(sim, Prepare)
        sim.feed(LoadSeen(waiting=0, running=1, kv_usage=0.1, busy=busy))
    assert len(sent(sim, Prepare)) == 1


def test_requests_that_take_too_long_to_finish_are_moved() -> None:
    sim = serving(3, drain_timeout_s=20.0)
    sim.feed(ScaleRequested(retire=(W0,)))
    sim.finish(0)
    for _ in range(19):
        sim.now += 1.0
        sim.feed(LoadSeen(waiting=0, running=1, kv_usage=0.1, busy=(W0,)))
        assert not sent(sim, Prepare)
    sim.now += 1.0
    sim.feed(Tick())
    assert len(sent(sim, Prepare)) == 1
    sim.settle()
    assert sim.state.progress(newest(sim)) == (1.0, True)


def test_a_worker_that_leaves_still_leaves_with_a_new_engine() -> None:
    sim = serving(3)
    sim.feed(ScaleRequested(retire=(W0,)))
    sim.lose_engine()
    assert sim.draining == ()
    sim.settle()
    assert (W0 in sim.facts.ranks, sim.draining) == (False, ())


def test_a_worker_that_is_needed_after_all_gets_requests_again() -> None:
    sim = serving(3)
    sim.feed(ScaleRequested(workers=2))
    assert sim.draining == (W2,)
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    sim.settle()
    assert sim.facts.ranks == (W0, W2)
    assert sim.draining == ()


# --- Nodes that leave ---------------------------------------------------------------------------------------------


def test_workers_on_a_node_that_leaves_are_replaced_before_it_ends() -> None:
    sim = serving(2, nodes=True)
    sim.feed(NodesDrain(nodes={"n1": 60.0, "elsewhere": None}))
    assert newest(sim).reason == "the node of w1 leaves, in 60 s"
    assert sim.draining == (W1,)
    assert [command.worker for command in sent(sim, StartWorker)] == [W2], "a worker in its place"
    assert [transfer.urgent for transfer in sent(sim, Transfer)] == [True], "no limit of bandwidth"
    sim.feed(NodesDrain(nodes={"n1": 59.0}))
    assert len(sent(sim, Drain)) == 1, "the notice is repeated"
    sim.settle()
    assert sim.facts.ranks == (W0, W2)
    assert sent(sim, StopWorker) == [StopWorker(worker=W1, info=info(W1, "n1"))]
    moved = [op for op in sim.state.operations.all() if op.retiring]
    assert [(op.phase, sim.state.progress(op)) for op in moved] == [(Phase.COMPLETED, (1.0, True))]


def test_requests_move_a_little_before_the_node_ends() -> None:
    sim = serving(3, drain_timeout_s=300.0, nodes=True)
    busy = LoadSeen(waiting=0, running=1, kv_usage=0.1, busy=(W0,))
    sim.feed(NodesDrain(nodes={"n0": 20.0}))
    sim.finish(next(i for i, command in enumerate(sim.todo) if isinstance(command, Transfer)))
    sim.now += 20.0 - FLIP_S - 0.1
    sim.feed(busy)
    assert not sent(sim, Prepare)
    sim.now += 0.1
    sim.feed(busy)
    assert len(sent(sim, Prepare)) == 1


def test_where_every_node_leaves_they_serve_until_others_are_there() -> None:
    sim = serving(2, nodes=True)
    sim.feed(NodesDrain(nodes={"n0": 30.0, "n1": 30.0}))
    assert sim.state.readiness().ready
    assert len(sent(sim, StartWorker)) == 2
    sim.settle()
    assert not {W0, W1} & set(sim.facts.ranks)


def test_a_worker_that_has_no_part_yet_ends_at_once_and_another_is_started_elsewhere() -> None:
    sim = serving(1, nodes=True)
    sim.feed(ScaleRequested(workers=3))
    # both load; the first to be done waits for the other
    sim.finish(0)
    sim.feed(NodesDrain(nodes={"n1": None}))
    assert sent(sim, StopWorker) == [StopWorker(worker=W1, info=info(W1, "n1"))]
    sim.settle()
    assert (W1 in sim.facts.ranks, len(sim.facts.ranks)) == (False, 3)


@pytest.mark.parametrize("stage", [Stage.PLANNING, Stage.TRANSFERRING, Stage.PREPARING])
def test_a_re_placement_gives_way_to_a_node_that_leaves_and_is_begun_again(stage: Stage) -> None:
    sim = serving(3, nodes=True)
    sim.feed(RebalanceRequested(planner="round_robin"))
    asked = newest(sim).operation_id
    while stage is not Stage.PLANNING and (sim.facts.change is None or sim.facts.change.stage is not stage):
        sim.finish(0)
    sim.feed(NodesDrain(nodes={"n2": 30.0}))
    sim.feed(Tick())
    # nothing keeps the experts of the leaving node waiting
    assert sim.facts.change is None or sim.facts.change.kind is OperationKind.SCALE
    sim.settle()
    assert W2 not in sim.facts.ranks
    operation = sim.state.operations.get(asked)
    assert operation is not None
    assert (operation.phase, operation.error) == (Phase.COMPLETED, None)
    assert sim.state.counters.rebalances["failed"] == 0


def test_a_given_placement_cannot_outlive_a_worker_that_it_names() -> None:
    sim = serving(3, nodes=True)
    sim.feed(PlaceRequested(placement=shuffled(sim.facts.spec.placement, sim.rng)))  # type: ignore[union-attr]
    sim.feed(NodesDrain(nodes={"n2": 30.0}))
    sim.settle()
    assert W2 not in sim.facts.ranks
    (failed,) = (op.error for op in sim.state.operations.all() if op.phase is Phase.FAILED)
    assert failed is not None
    assert failed.startswith("placement: workers: expected")


def test_a_look_that_nobody_asked_for_ends_for_a_node_that_leaves() -> None:
    sim = serving(3, nodes=True, interval_s=600.0)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    sim.feed(SubjectChanged(first=True))
    asked = newest(sim)
    assert asked.kind is OperationKind.REBALANCE
    sim.feed(NodesDrain(nodes={"n2": 30.0}))
    assert sim.state.operations.get(asked.operation_id).phase is Phase.FAILED  # type: ignore[union-attr]


def test_a_coordinator_that_was_restarted_hears_the_end_again() -> None:
    sim = serving(3, drain_timeout_s=300.0, nodes=True)
    sim.feed(NodesDrain(nodes={"n0": 100.0}))
    sim.restart_coordinator(flipped=0.0)
    assert sim.facts.records[W0].leave_by is None
    sim.feed(NodesDrain(nodes={"n0": 50.0}))
    assert sim.facts.records[W0].leave_by == sim.now + 50.0
    sim.settle()
    assert W0 not in sim.facts.ranks


# --- The decision alone -------------------------------------------------------------------------------------------


def leaves(**facts: object) -> Facts:
    """W1 leaves by the change that is under way, since 10 s."""
    change = Change(
        operation_id="scale-1",
        kind=OperationKind.SCALE,
        spec=spec_of(W0, epoch=2),
        goal=placement_of(W0),
        forms_group=True,
        transfers=Transfers(),
        stage=Stage.DRAINING,
        stage_since=0.0,
        urgent=False,
    )
    members = [member(W0), member(W1, WorkerState.DRAINING, draining_since=10.0)]
    return facts_of(members, [W0, W1], **{"change": change, "busy": (W0, W1), **facts})


@pytest.mark.parametrize(
    ("facts", "now", "value", "reason"),
    [
        (leaves(), 39.9, False, "w1 may finish its requests first"),
        (leaves(), 40.0, True, "no worker that leaves"),
        (leaves(busy=(W0,)), 11.0, True, "no worker that leaves"),
        (leaves(busy=None), 11.0, False, "w1 may finish"),
        (leaves(outage=Outage(reason="", cause=Cause.STEP, since=0.0)), 11.0, True, "nothing is served"),
    ],
)
def test_when_leaving_workers_have_had_their_time(facts: Facts, now: float, value: bool, reason: str) -> None:
    choice = drained(facts, now)
    assert choice.value is value
    assert reason in choice.reason


def test_the_engine_gets_the_draining_workers_once_and_again_after_a_loss() -> None:
    draining = Draining()
    assert draining.spare(leaves()) == [Drain(workers=(W1,))]
    assert draining.spare(leaves()) == []
    draining.engine_lost()
    assert draining.spare(leaves(outage=Outage(reason="", cause=Cause.ENGINE, since=0.0))) == []
    assert draining.spare(leaves()) == [Drain(workers=(W1,))]
    draining.resume()
    assert draining.spare(leaves()) == [Drain(workers=(W1,))]


def test_where_all_are_to_leave_all_go_on() -> None:
    assert leaving(facts_of([member(w, WorkerState.DRAINING) for w in (W0, W1)], [W0, W1])) == ()
