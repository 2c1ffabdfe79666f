"""How many workers there should be."""

from dataclasses import replace

import pytest

from elastic_moe.cluster.control.scaling import (
    advise,
    check_memory,
    check_target,
    fewest_wanted,
    seats_per_worker,
    surplus,
)
from elastic_moe.cluster.control.state import ControlState
from elastic_moe.cluster.decisions.autoscaling import Sample
from elastic_moe.cluster.errors import ConflictError, PlacementError
from elastic_moe.cluster.facts.events import (
    LoadSeen,
    NodesDrain,
    PlaceRequested,
    RebalanceRequested,
    ScaleRequested,
    StepFailed,
    Tick,
    WorkerLost,
)
from elastic_moe.cluster.facts.facts import ControlSettings
from elastic_moe.cluster.messages.epochs import StateRoom
from elastic_moe.cluster.messages.views import Phase, WorkerState
from elastic_moe.cluster.placement import WorkerId
from tests.cluster.simulation import EXPERTS, LAYERS, MODEL, Simulation, node_of
from tests.cluster.stories import PART, W0, W1, W2, facts_of, member, newest, redeployed, serving


def test_more_workers_than_experts_is_refused() -> None:
    with pytest.raises(PlacementError, match="expected 1 to 8"):
        Simulation(workers=EXPERTS + 1)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ScaleRequested(workers=0), "workers: expected"),
        (ScaleRequested(workers=9), "workers: expected"),
        (ScaleRequested(retire=(WorkerId("w0,w1"),)), r"retire: .* serving workers \(w0, w1\), got 'w0,w1'"),
    ],
)
def test_scaling_to_an_impossible_size_is_refused(request_: ScaleRequested, message: str) -> None:
    sim = serving(2)
    with pytest.raises(PlacementError, match=message):
        sim.feed(request_)
    assert not sim.log


def test_a_death_that_leaves_the_wanted_size_ends_the_scaling() -> None:
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


@pytest.mark.parametrize("dies", [(W0,), (W0, W1), (W1, W2), (W2, W0)])
@pytest.mark.parametrize("at_once", [True, False])
def test_who_dies_while_others_leave_has_left_in_the_place_of_one_that_stays(
    dies: tuple[WorkerId, ...], at_once: bool
) -> None:
    sim = serving(4)
    sim.feed(ScaleRequested(workers=2, operation_id="down"))
    for worker in dies:
        sim.kill(worker)
        if not at_once:
            sim._find_lost([worker])
    sim.settle()
    operation = sim.state.operations.get("down")
    assert operation is not None
    assert (operation.phase, sim.state.progress(operation)) == (Phase.COMPLETED, (1.0, True))
    assert {*operation.retiring} >= {*dies}
    assert {*operation.retiring, *sim.facts.ranks} == {W0, W1, W2, WorkerId("w3")}, "who is said to go does not serve"
    assert len(operation.retiring) == 2


def test_who_leaves_with_its_node_does_so_in_the_place_of_one_that_stays() -> None:
    sim = serving(2, nodes=True)
    sim.feed(ScaleRequested(workers=1, operation_id="down"))
    sim.feed(NodesDrain(nodes={node_of(W0): None}))
    sim.settle()
    operation = sim.state.operations.get("down")
    assert operation is not None
    assert (sim.facts.ranks, operation.retiring, sim.state.progress(operation)) == ((W1,), (W0,), (1.0, True))


def test_a_join_overtaken_by_a_recovery_ends_with_it() -> None:
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


def test_a_waiting_scaling_is_replaced_only_if_the_new_one_says_so() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=4, operation_id="first"))
    with pytest.raises(ConflictError, match=r"first is under way \(scale: .*4"):
        sim.feed(ScaleRequested(workers=3))
    assert sim.facts.target == 4
    sim.feed(ScaleRequested(workers=2, replace=True))
    sim.settle()
    first = sim.state.operations.get("first")
    assert first is not None
    assert (first.phase, first.error) == (Phase.FAILED, "replaced by another request")
    assert len(sim.facts.ranks) == 2


def test_a_re_placement_that_a_waiting_scaling_would_end_is_refused_with_its_name() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=3, operation_id="more"))
    assert sim.facts.spec is not None
    for event in (RebalanceRequested(planner="auto"), PlaceRequested(placement=sim.facts.spec.placement, pinned=True)):
        with pytest.raises(ConflictError, match="more is under way"):
            sim.feed(event)
    sim.feed(ScaleRequested(workers=2, replace=True))
    assert sim.facts.target == 2


def test_never_below_what_holds_every_expert() -> None:
    sim = serving(3, capacity=PART)
    for event in (ScaleRequested(workers=1), ScaleRequested(retire=(W0, W1))):
        with pytest.raises(PlacementError, match="expected at least 2: a layer has 8 experts"):
            sim.feed(event)
    sim.feed(ScaleRequested(workers=2))
    sim.settle()
    assert sim.facts.ranks == (W0, W1)


def test_a_start_without_memory_for_one_expert_of_each_layer_is_refused() -> None:
    ControlState(ControlSettings(workers=1, expert_capacity=LAYERS), MODEL)
    with pytest.raises(PlacementError, match="expert_memory_bytes: expected at least 3000, room for one expert"):
        ControlState(ControlSettings(workers=1, expert_capacity=LAYERS - 1), MODEL)


def test_a_start_without_memory_for_every_expert_fails_where_there_is_no_disk_tier() -> None:
    sim = Simulation(workers=2, capacity=PART - LAYERS)
    sim.feed(Tick())
    sim.settle()
    assert "have memory for 3, 3: raise --workers" in (sim.state.readiness().error or "")


def test_one_worker_is_replaced_by_another() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=2, retire=(W1,)))
    sim.settle()
    assert sim.facts.ranks == (W0, W2)
    assert sim.state.progress(newest(sim)) == (1.0, True)
    assert sim.facts.records[W1].state is WorkerState.STOPPED, "nobody has lost it"


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
    assert "at most 4 workers may serve" in (view.autoscaler or "")
    with pytest.raises(PlacementError, match="1 to 4"):
        sim.feed(ScaleRequested(workers=5))
    for _ in range(200):
        sim.now += 1.0
        sim.feed(LoadSeen(waiting=0, running=0, kv_usage=0.0))
    assert sim.facts.target == 3


# --- The decisions alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "workers", "message"),
    [
        ({}, 9, r"expected 1 to 8 \(each needs an expert"),
        ({"min_workers": 2, "max_workers": 4}, 1, r"expected 2 to 4 \(the limits of the autoscaler"),
        ({"expert_capacity": 1}, 8, "expert_memory_bytes: .* it is room for 1 expert"),
    ],
)
def test_impossible_numbers_of_workers(limits: dict[str, int], workers: int, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        check_target(ControlSettings(workers=1, **limits), MODEL, workers)


def test_those_that_load_leave_first_and_then_the_newest() -> None:
    facts = facts_of([member(W0), member(W1, loaded_at=None), member(W2)], [W0, W2])
    assert [m.id for m in surplus(facts, 2)] == [W1]
    assert [m.id for m in surplus(facts, 1)] == [W2, W1]
    assert [m.id for m in surplus(facts, 1, retire=[W0])] == [W1]


def test_those_that_stay_must_hold_every_expert() -> None:
    facts = facts_of([member(w, capacity=PART) for w in (W0, W1, W2)], [W0, W1, W2])
    check_memory(facts, 2, [W0])
    with pytest.raises(PlacementError, match=r"expected at least 2.*have memory for w0 4"):
        check_memory(facts, 1, [])


def test_the_autoscaler_leaves_as_many_as_hold_every_expert() -> None:
    settings = ControlSettings(workers=2, max_workers=4, autoscale_window_s=1.0)
    facts = facts_of([member(w, capacity=PART) for w in (W0, W1)], [W0, W1], settings=settings)
    assert fewest_wanted(facts) == 2
    quiet = [Sample(at_s=at, waiting=0, running=0, kv_usage=0.0) for at in (0.0, 100.0)]
    assert advise(facts, quiet, 100.0, 0.0).target == 2


def test_the_autoscaler_counts_as_many_seats_as_have_memory_for_their_states() -> None:
    record = member(W0, capacity=PART)
    assert record.info is not None
    room = replace(record.info, state_room=StateRoom(seats=3, snapshots=0))
    settings = ControlSettings(workers=1, seats_per_worker=8)
    facts = facts_of([replace(record, info=room), member(W1, capacity=PART)], [W0, W1], settings=settings)
    assert seats_per_worker(facts) == 3
    assert seats_per_worker(facts_of([record], [W0], settings=settings)) == 8


# --- A redeploy ---------------------------------------------------------------------------------------------------


def test_a_redeploy_with_another_number_of_workers_scales() -> None:
    sim = serving(2)
    sim.feed(redeployed(workers=3, drain_timeout_s=7.0))
    assert (newest(sim).reason, sim.facts.settings.drain_timeout_s) == ("redeployed to 3 workers", 7.0)
    sim.settle()
    assert len(sim.facts.ranks) == 3


def test_a_redeploy_that_does_not_speak_of_workers_leaves_the_number_that_was_asked_for() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=4))
    sim.settle()
    sim.feed(redeployed(rebalance_interval_s=9.0))
    assert (sim.facts.target, sim.facts.settings.rebalance_interval_s) == (4, 9.0)
    sim.feed(redeployed(min_workers=1, max_workers=3))
    assert sim.facts.target == 3, "the new limits hold"
    sim.settle()
    assert sim.state.view().autoscaler is not None


def test_a_redeploy_that_leaves_too_little_memory_is_refused_and_nothing_changes() -> None:
    sim = serving(2, capacity=LAYERS * EXPERTS // 2)
    with pytest.raises(PlacementError, match="workers: expected at least 2"):
        sim.feed(redeployed(workers=1))
    sim.settle()
    assert (sim.facts.target, len(sim.facts.ranks)) == (2, 2)


def test_a_redeploy_before_the_first_epoch_is_refused_for_memory_too() -> None:
    sim = Simulation(workers=2, capacity=LAYERS * EXPERTS // 2)
    sim.feed(Tick())
    sim.finish(0)
    with pytest.raises(PlacementError, match="workers: expected at least 2"):
        sim.feed(redeployed(workers=1))
    sim.settle()
    assert len(sim.facts.ranks) == 2


def test_a_redeploy_that_finds_smaller_workers_when_its_turn_comes_fails_as_an_operation() -> None:
    sim = serving(2, capacity=LAYERS * EXPERTS)
    sim.capacity = LAYERS * EXPERTS // 2
    sim.feed(ScaleRequested(workers=3))
    sim.finish(0)
    assert sim.facts.change is not None
    sim.feed(redeployed(workers=1, rebalance_interval_s=7.0))
    sim.kill(W0)
    sim.kill(W1)
    sim.settle()
    assert (sim.facts.target, len(sim.facts.ranks), sim.facts.settings.rebalance_interval_s) == (3, 3, 7.0)
    refused = next(each for each in sim.state.operations.all() if each.reason == "redeployed to 1 worker")
    assert refused.phase is Phase.FAILED
    assert refused.error is not None
    assert "workers: expected at least 2" in refused.error


@pytest.mark.parametrize(("most", "limit", "workers"), [(2, 2, 2), (1, None, 3)])
def test_limits_of_a_redeploy_hold_also_where_its_number_of_workers_is_refused(
    most: int, limit: int | None, workers: int
) -> None:
    """Unless no number within them has memory for the model."""
    sim = serving(2, capacity=LAYERS * EXPERTS)
    sim.capacity = LAYERS * EXPERTS // 2
    sim.feed(ScaleRequested(workers=3))
    sim.finish(0)
    sim.feed(redeployed(workers=1, max_workers=most))
    sim.kill(W0)
    sim.kill(W1)
    sim.settle()
    assert (sim.facts.target, len(sim.facts.ranks), sim.facts.settings.max_workers) == (workers, workers, limit)


def test_a_redeploy_while_all_nodes_leave_needs_memory_for_the_model_too() -> None:
    """Otherwise those that leave would be needed for ever."""
    sim = serving(2, capacity=LAYERS * EXPERTS // 2, nodes=True)
    sim.feed(StepFailed(epoch=sim.facts.epoch, suspects=(), reason="aborted"))
    sim.feed(NodesDrain(nodes={"n0": 60.0, "n1": 60.0}))
    with pytest.raises(PlacementError, match=r"expected at least 2.*have memory for none; 1 would be started"):
        sim.feed(redeployed(workers=1))
    sim.settle()
    assert sim.facts.ranks == ("w2", "w3")


def test_a_redeploy_waits_until_the_change_under_way_is_made() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=1))
    sim.feed(redeployed(workers=3))
    assert sim.facts.target == 1
    sim.settle()
    assert (sim.facts.target, len(sim.facts.ranks)) == (3, 3)


def test_a_redeploy_before_the_first_epoch_changes_the_start() -> None:
    sim = Simulation(workers=4)
    sim.feed(Tick())
    sim.feed(redeployed(workers=2))
    sim.settle()
    assert len(sim.facts.ranks) == 2


def test_a_redeploy_with_more_workers_than_experts_changes_nothing() -> None:
    sim = serving(2)
    with pytest.raises(PlacementError, match="expected 1 to 8"):
        sim.feed(redeployed(workers=9, drain_timeout_s=1.0))
    sim.feed(Tick())
    assert (sim.facts.target, sim.facts.settings.drain_timeout_s) == (2, 30.0)
