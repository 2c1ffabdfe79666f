"""What the control plane does in the cases that have names."""

from dataclasses import replace

import numpy as np
import pytest

from cluster.errors import ConflictError, NotReadyError, PlacementError
from cluster.events import (
    Abandon,
    AbortSteps,
    Commit,
    CommitFailed,
    Committed,
    LoadSeen,
    PlaceRequested,
    PlanReady,
    Prepare,
    RebalanceRequested,
    ScaleRequested,
    Solve,
    StartWorker,
    StepFailed,
    StopWorker,
    Tick,
    Transfer,
    Unpin,
    WorkerFailed,
    WorkerLost,
)
from cluster.facts import ControlSettings
from cluster.messages.views import Operation, Phase
from cluster.placement import EMPTY, WorkerId
from cluster.rebalancing import room
from cluster.state import ControlState
from tests.cluster.simulation import EXPERTS, LAYERS, MODEL, Simulation, shuffled


def serving(workers: int, **settings: float) -> Simulation:
    sim = Simulation(workers=workers, **settings)  # type: ignore[arg-type]
    sim.feed(Tick())
    sim.settle()
    sim.log.clear()
    return sim


def newest(sim: Simulation) -> Operation:
    return sim.state.operations.all()[0]


def sent(sim: Simulation, kind: type) -> list:
    return [command for command in sim.log if isinstance(command, kind)]


IDLE = LoadSeen(waiting=0, running=0, kv_usage=0.0)

W0, W1, W2 = WorkerId("w0"), WorkerId("w1"), WorkerId("w2")


def test_start_loads_every_expert_once_and_needs_no_transfer() -> None:
    sim = Simulation(workers=3)
    sim.feed(Tick())
    starts = sent(sim, StartWorker)
    assert [start.worker for start in starts] == [W0, W1, W2]
    for layer in range(LAYERS):
        assert sorted(e for start in starts for e in start.experts[layer]) == list(range(EXPERTS))
    assert [len(start.experts[0]) for start in starts] == [3, 3, 2]
    assert not sim.state.readiness().ready
    sim.settle()
    assert sim.state.readiness().ready
    assert sim.facts.epoch == 1
    assert not sent(sim, Transfer)
    assert newest(sim).phase is Phase.COMPLETED


def test_start_waits_for_all_workers() -> None:
    sim = Simulation(workers=2)
    sim.feed(Tick())
    sim.finish(0)
    sim.now += 1000
    sim.feed(Tick())
    assert not sent(sim, Prepare)
    assert "1 of 2 workers ready" in sim.state.readiness().reason


def test_more_workers_than_experts_is_refused() -> None:
    with pytest.raises(PlacementError, match="expected 1 to 8"):
        Simulation(workers=EXPERTS + 1)


def test_a_checkpoint_that_no_worker_can_load_ends_the_start() -> None:
    sim = Simulation(workers=2)
    sim.feed(Tick())
    sim.feed(WorkerFailed(worker=W0, reason="shard 3 is damaged", fatal=True))
    assert sim.state.readiness().error == "shard 3 is damaged"
    assert newest(sim).phase is Phase.FAILED
    sim.log.clear()
    sim.now += 100
    sim.feed(Tick())
    assert not sim.log


def test_a_worker_that_dies_while_loading_is_started_again_a_few_times() -> None:
    sim = Simulation(workers=2)
    sim.feed(Tick())
    sim.finish(1)
    for _ in range(4):
        assert sim.state.readiness().error is None
        sim.finish(-1, fault=True)
        sim.now += 60
        sim.feed(Tick())
    assert "died while it loaded" in (sim.state.readiness().error or "")


def test_a_replacement_at_the_start_loads_what_its_predecessor_was_told() -> None:
    sim = Simulation(workers=2)
    sim.feed(Tick())
    sim.finish(0, fault=True)
    sim.settle()
    assert sim.facts.ranks == (W1, W2)
    assert not sent(sim, Transfer)


def test_death_makes_an_epoch_of_the_survivors_which_read_what_was_lost() -> None:
    sim = serving(2)
    sim.kill(W0)
    sim.feed(WorkerLost(worker=W0, reason="died"))
    (transfer,) = sent(sim, Transfer)
    assert transfer.copies == ()
    assert {key[1:] for key in transfer.reads} == {(layer, e) for layer in range(LAYERS) for e in range(4)}
    assert not sim.state.readiness().ready
    while sim.facts.change is not None:
        index = next(i for i, command in enumerate(sim.todo) if not isinstance(command, StartWorker))
        sim.finish(index)
    assert sim.state.readiness().ready
    assert sim.facts.ranks == (W1,)
    assert newest(sim).kind == "recover"
    assert "w0 lost" in newest(sim).reason
    # and then the replacement joins, by copies
    sim.log.clear()
    sim.settle()
    assert sim.facts.ranks == (W1, W2)
    assert all(not transfer.reads for transfer in sent(sim, Transfer))


@pytest.mark.parametrize("recovers", [True, False])
def test_survivors_serve_again_before_a_replacement_is_started(recovers: bool) -> None:
    sim = serving(2)
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    assert not sent(sim, StartWorker)
    if recovers:
        while sim.todo:
            sim.finish(0)
    else:
        # nothing comes of it for some reason
        sim.now += 6.0
        sim.feed(Tick())
    assert sim.state.readiness().ready is recovers
    assert [command.worker for command in sent(sim, StartWorker)] == [WorkerId("w2")]
    sim.settle()
    assert sim.facts.ranks == (W0, WorkerId("w2"))


def test_death_of_all_starts_anew() -> None:
    sim = serving(2)
    for worker in (W0, W1):
        sim.kill(worker)
        sim.feed(WorkerLost(worker=worker, reason="died"))
    assert "recovering" in sim.state.readiness().reason
    sim.settle()
    assert sim.facts.ranks == (WorkerId("w2"), WorkerId("w3"))


def test_after_the_death_of_all_the_first_to_load_waits_for_others_as_long_as_it_took() -> None:
    sim = serving(2)
    for worker in (W0, W1):
        sim.kill(worker)
        sim.feed(WorkerLost(worker=worker, reason="died"))
    sim.now += 4.0
    sim.finish(next(n for n, c in enumerate(sim.todo) if isinstance(c, StartWorker)))
    for seconds, serves in ((3.9, False), (0.2, True)):
        sim.now += seconds
        sim.feed(Tick())
        while not isinstance(sim.todo[-1], StartWorker):
            sim.finish(len(sim.todo) - 1)
        assert sim.state.readiness().ready is serves
    assert sim.facts.ranks == (WorkerId("w2"),)
    sim.settle()
    assert sim.facts.ranks == (WorkerId("w2"), WorkerId("w3"))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_death_during_a_rebalance_rolls_it_back_and_recovers(stage: int) -> None:
    """While transferring, preparing, committing."""
    sim = serving(3)
    sim.feed(RebalanceRequested(planner="auto"))
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


def test_a_worker_that_dies_in_the_flip_and_is_not_missed_by_the_engine() -> None:
    sim = serving(3)
    sim.feed(ScaleRequested(workers=2))
    sim.feed(IDLE)
    while not any(isinstance(command, Commit) for command in sim.todo):
        sim.finish(0)
    sim.feed(WorkerLost(worker=W0, reason="died"))
    assert sim.facts.change is not None
    sim.hosts[W0].alive = True
    sim.finish(0)
    assert not sim.state.readiness().ready
    sim.hosts[W0].alive = False
    sim.settle()
    assert W0 not in sim.facts.ranks


def test_after_a_failed_flip_nothing_is_counted_on_that_may_be_gone() -> None:
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
        assert (sim.facts.members[worker].held <= sim.hosts[worker].held).all()
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


def test_a_failed_step_with_no_death_forms_a_new_group() -> None:
    sim = serving(2)
    assert sim.facts.spec is not None
    group = sim.facts.spec.group
    sim.feed(StepFailed(epoch=sim.facts.epoch, suspects=(), reason="the workers lost one another"))
    assert not sent(sim, Prepare), "not before it is known who is there"
    sim.settle()
    assert sim.facts.ranks == (W0, W1)
    assert sim.facts.spec.group != group
    assert not sent(sim, Transfer)


def test_a_failed_step_of_an_earlier_epoch_is_old_news() -> None:
    sim = serving(2)
    sim.feed(StepFailed(epoch=sim.facts.epoch - 1, suspects=(W0,), reason="late"))
    assert not sim.log
    assert sim.state.readiness().ready


def test_a_worker_to_blame_for_one_failed_step_after_the_other_is_replaced() -> None:
    sim = serving(2)
    for _ in range(3):
        sim.feed(StepFailed(epoch=sim.facts.epoch, suspects=(W1,), reason="no answer in time"))
        sim.settle()
    assert StopWorker(worker=W1) in sim.log
    assert sim.facts.ranks == (W0, W2)


def test_a_lost_engine_is_recovered_from_with_the_same_workers() -> None:
    sim = serving(2)
    sim.lose_engine()
    # it may have died with a worker that others wait for, and cannot tell them any more
    assert sent(sim, AbortSteps) == [AbortSteps(epochs=(1,), workers=(W0, W1))]
    assert not sim.state.readiness().ready
    sim.settle()
    assert sim.facts.ranks == (W0, W1)
    assert newest(sim).kind == "recover"


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
    assert len(transfer.copies) == len(sim.facts.spec.placement.moves_from(before.placement))
    assert newest(sim).phase is Phase.COMPLETED
    assert sim.state.counters.experts_moved == len(transfer.copies)
    assert sim.state.counters.bytes_moved == 1000 * len(transfer.copies)


def answer(sim: Simulation, *, worthwhile: bool, no_worse: bool) -> None:
    solve = sim.todo.pop()
    assert isinstance(solve, Solve)
    assert sim.facts.spec is not None
    placement = shuffled(sim.facts.spec.placement, sim.rng)
    sim.feed(
        PlanReady(ticket=solve.ticket, placement=placement, worthwhile=worthwhile, no_worse=no_worse, reason="gain 1 %")
    )


def test_a_periodic_plan_must_be_worthwhile_a_requested_one_only_no_worse() -> None:
    sim = serving(2, interval_s=5.0)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    sim.now += 10
    sim.feed(Tick())
    answer(sim, worthwhile=False, no_worse=True)
    assert sim.facts.change is None
    assert "placement kept, gain 1 %" in newest(sim).reason
    assert sim.state.counters.rebalances == {"completed": 0, "failed": 0, "skipped": 1}
    sim.feed(RebalanceRequested(planner="auto"))
    answer(sim, worthwhile=False, no_worse=True)
    assert sim.facts.change is not None


@pytest.mark.parametrize("workers", [1, 2])
def test_for_a_lone_worker_nothing_is_planned_unless_asked(workers: int) -> None:
    sim = serving(workers, interval_s=5.0)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    sim.now += 10
    sim.feed(Tick())
    assert len(sent(sim, Solve)) == workers - 1
    if workers == 1:
        sim.feed(RebalanceRequested(planner="auto"))
        assert sent(sim, Solve)


@pytest.mark.parametrize(("planner", "adopted"), [("auto", False), ("round_robin", True)])
def test_a_planner_that_is_asked_for_by_name_is_obeyed(planner: str, adopted: bool) -> None:
    sim = serving(2)
    sim.feed(RebalanceRequested(planner=planner))
    answer(sim, worthwhile=False, no_worse=False)
    assert (sim.facts.change is not None) == adopted


def test_a_night_of_skipped_plans_is_one_line_of_history() -> None:
    sim = serving(2, interval_s=5.0)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    for _ in range(20):
        sim.now += 10
        sim.feed(Tick())
        answer(sim, worthwhile=False, no_worse=True)
    assert [operation.kind for operation in sim.state.operations.all()] == ["rebalance", "start"]
    assert sim.state.counters.rebalances["skipped"] == 20


def test_nothing_counted_nothing_planned() -> None:
    sim = serving(2, interval_s=5.0)
    sim.now += 100
    sim.feed(Tick())
    assert not sent(sim, Solve)


def test_a_competing_request_is_refused_and_changes_nothing() -> None:
    sim = serving(2)
    sim.feed(RebalanceRequested(planner="auto"))
    operations = sim.state.operations.all()
    with pytest.raises(ConflictError, match=operations[0].operation_id):
        sim.feed(RebalanceRequested(planner="auto"))
    with pytest.raises(ConflictError):
        sim.feed(ScaleRequested(workers=3))
    assert sim.state.operations.all() == operations


def test_requests_before_the_first_epoch_are_refused() -> None:
    state: ControlState = Simulation(workers=1).state
    with pytest.raises(NotReadyError):
        state.handle(RebalanceRequested(planner="auto"), 0.0)


def test_scale_up_joins_all_new_workers_in_one_epoch() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=4))
    assert sim.state.readiness().ready
    sim.settle()
    assert len(sent(sim, Commit)) == 1
    assert len(sim.facts.ranks) == 4
    assert newest(sim).phase is Phase.COMPLETED
    # what they are to have, they loaded while the others served
    assert not sent(sim, Transfer)
    assert sim.facts.spec is not None
    assert {worker.slots for worker in sim.facts.spec.placement.workers} == {2}


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
    assert sent(sim, StopWorker) == [StopWorker(worker=W0)]
    assert not any(transfer.reads for transfer in sent(sim, Transfer))
    assert sim.facts.ranks == (W1, W2)


@pytest.mark.parametrize(
    "request_", [ScaleRequested(workers=0), ScaleRequested(workers=9), ScaleRequested(retire=(WorkerId("w7"),))]
)
def test_scaling_to_what_cannot_be_is_refused(request_: ScaleRequested) -> None:
    sim = serving(2)
    with pytest.raises(PlacementError):
        sim.feed(request_)
    assert not sim.log


def test_spare_slots_are_shared_out_and_empty_until_a_planner_fills_them() -> None:
    sim = serving(2, redundant=4)
    assert sim.facts.spec is not None
    placement = sim.facts.spec.placement
    assert [worker.slots for worker in placement.workers] == [6, 6]
    assert (placement.physical_to_logical_map == EMPTY).sum() == LAYERS * 4


def test_a_death_that_brings_the_wanted_size_about_ends_the_scaling() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=1))
    scaling = newest(sim).operation_id
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    sim.settle()
    assert sim.facts.ranks == (W0,)
    operation = sim.state.operations.get(scaling)
    assert operation is not None
    assert operation.phase is Phase.COMPLETED


def test_a_worker_that_was_one_too_many_stays_when_another_dies() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=1))
    sim.kill(W0)
    sim.feed(WorkerLost(worker=W0, reason="died"))
    sim.settle()
    assert sim.facts.ranks == (W1,)
    assert not sent(sim, StartWorker)


def test_a_join_that_a_recovery_overtakes_is_ended_with_it() -> None:
    sim = serving(2)
    sim.kill(W0)
    sim.feed(WorkerLost(worker=W0, reason="died"))
    while newest(sim).kind != "scale":
        sim.finish(0)
        sim.now += 1
        sim.feed(Tick())
    # the replacement is about to join, and the only other worker dies
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    sim.settle()
    assert sim.state.operations.find_open() is None


def test_a_repeated_scaling_is_the_same_operation() -> None:
    sim = serving(2)
    wish = ScaleRequested(workers=3, operation_id="mine")
    sim.feed(wish)
    sim.feed(wish)
    sim.settle()
    sim.feed(wish)
    assert [op.operation_id for op in sim.state.operations.all()] == ["mine", "start-1"]
    assert sim.facts.target == 3
    with pytest.raises(ConflictError, match="another"):
        sim.feed(ScaleRequested(workers=2, operation_id="mine"))
    with pytest.raises(ConflictError, match="another"):
        sim.feed(ScaleRequested(workers=2, operation_id="start-1"))


def test_a_scaling_that_waits_for_workers_gives_way_only_when_told_to() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=4, operation_id="first"))
    with pytest.raises(ConflictError, match="first"):
        sim.feed(ScaleRequested(workers=3))
    assert sim.facts.target == 4
    sim.feed(ScaleRequested(workers=2, replace=True))
    sim.settle()
    first = sim.state.operations.get("first")
    assert first is not None
    assert (first.phase, first.error) == (Phase.FAILED, "replaced by another request")
    assert len(sim.facts.ranks) == 2


def test_a_retired_worker_may_be_terminated_once_it_is_out_of_use() -> None:
    sim = serving(3)
    sim.feed(ScaleRequested(retire=(W0,)))
    seen = [sim.state.progress(newest(sim))]
    sim.finish(0)
    seen.append(sim.state.progress(newest(sim)))
    sim.feed(IDLE)
    while sim.todo:
        seen.append(sim.state.progress(newest(sim)))
        sim.finish(0)
    seen.append(sim.state.progress(newest(sim)))
    assert seen == [(0.5, False), (0.7, False), (0.8, False), (0.9, False), (1.0, True)]
    assert newest(sim).retiring == (W0,)


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


def test_a_new_engine_is_told_again_whom_to_spare() -> None:
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


PART = LAYERS * EXPERTS // 2
"""Experts that half of the workers needed have memory for."""


def test_never_below_what_holds_every_expert() -> None:
    sim = serving(3, capacity=PART)
    for event in (ScaleRequested(workers=1), ScaleRequested(retire=(W0, W1))):
        with pytest.raises(PlacementError, match="expected at least 2: a layer has 8 experts"):
            sim.feed(event)
    sim.feed(ScaleRequested(workers=2))
    sim.settle()
    assert sim.facts.ranks == (W0, W1)


def test_survivors_without_memory_wait_for_a_replacement_which_reads_what_was_lost() -> None:
    sim = serving(2, capacity=PART)
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    assert not sent(sim, Transfer)
    assert "memory for 4 of 8 experts per layer: waiting for a replacement" in sim.state.readiness().reason
    (start,) = sent(sim, StartWorker)
    assert start.experts == ((4, 5, 6, 7),) * LAYERS
    sim.settle()
    assert sim.facts.ranks == (W0, W2)


def test_a_plan_that_needs_more_memory_than_there_is_is_refused() -> None:
    sim = serving(2, capacity=PART + 1)
    assert sim.facts.spec is not None
    placement = sim.facts.spec.placement
    turned = np.roll(placement.physical_to_logical_map, 4, axis=1)
    with pytest.raises(PlacementError, match="memory for 13 experts"):
        sim.feed(PlaceRequested(placement=replace(placement, physical_to_logical_map=turned)))
    assert room(sim.facts) == 1


def test_a_start_that_cannot_hold_every_expert_is_refused() -> None:
    with pytest.raises(PlacementError, match="expected at least 2"):
        ControlState(ControlSettings(workers=1, expert_capacity=PART), MODEL)


def test_a_restarted_coordinator_keeps_those_that_still_load() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=3))
    operation = newest(sim)
    sim.restart_coordinator(flipped=0.0)
    assert not sent(sim, StopWorker)
    sim.settle()
    assert sim.facts.ranks == (W0, W1, W2)
    again = sim.state.operations.get(operation.operation_id)
    assert again is not None
    assert again.phase is Phase.COMPLETED


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


def test_one_worker_is_replaced_by_another() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=2, retire=(W1,)))
    sim.settle()
    assert sim.facts.ranks == (W0, W2)
    assert sim.state.progress(newest(sim)) == (1.0, True)


def test_a_given_placement_is_gone_to_and_pinned() -> None:
    sim = serving(2, interval_s=3.0)
    assert sim.facts.spec is not None
    placement = shuffled(sim.facts.spec.placement, sim.rng)
    sim.feed(PlaceRequested(placement=placement, pinned=True))
    assert not sim.facts.pinned
    sim.settle()
    assert sim.facts.spec.placement == placement
    assert sim.facts.pinned
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    sim.log.clear()
    for _ in range(10):
        sim.now += 1.0
        sim.feed(Tick())
    assert not sent(sim, Solve)
    sim.feed(PlaceRequested(placement=placement, pinned=None))
    assert newest(sim).phase is Phase.COMPLETED
    assert sim.facts.pinned
    sim.feed(Unpin())
    sim.now += 3.0
    sim.feed(Tick())
    assert sent(sim, Solve)


def test_a_given_placement_that_fails_pins_nothing() -> None:
    sim = serving(2)
    assert sim.facts.spec is not None
    before = sim.facts.spec.placement
    sim.feed(PlaceRequested(placement=shuffled(before, sim.rng), pinned=True))
    sim.finish(0, fault=True)
    assert newest(sim).phase is Phase.FAILED
    assert sim.facts.spec.placement == before
    assert not sim.facts.pinned


def test_a_placement_of_other_workers_is_refused() -> None:
    sim, other = serving(2), serving(3)
    assert other.facts.spec is not None
    with pytest.raises(PlacementError, match="w0 with 4 slots, w1 with 4 slots"):
        sim.feed(PlaceRequested(placement=other.facts.spec.placement))


def test_the_autoscaler_scales_with_its_reason() -> None:
    assert serving(2).state.view().autoscaler is None
    sim = serving(2, most=4)
    sim.feed(LoadSeen(waiting=0, running=0, kv_usage=0.0))
    assert sim.state.view().autoscaler == "the load has not been seen for 15 s"
    for _ in range(60):
        sim.now += 1.0
        sim.feed(LoadSeen(waiting=200, running=128, kv_usage=0.9))
    assert "autoscale from 2 to 4 workers: demand" in newest(sim).reason
    sim.settle()
    assert len(sim.facts.ranks) == 4
    for _ in range(20):
        sim.now += 1.0
        sim.feed(LoadSeen(waiting=500, running=256, kv_usage=0.9))
    view = sim.state.view()
    assert (view.serving, view.target, view.min_workers, view.max_workers) == (4, 4, 1, 4)
    assert "at most 4 are to serve" in (view.autoscaler or "")
    with pytest.raises(PlacementError, match="1 to 4"):
        sim.feed(ScaleRequested(workers=5))
    for _ in range(200):
        sim.now += 1.0
        sim.feed(LoadSeen(waiting=0, running=0, kv_usage=0.0))
    assert sim.facts.target == 3


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
