"""When a planner is asked, and what becomes of its answer."""

from dataclasses import replace

import numpy as np
import pytest

from elastic_moe.cluster.control.rebalancing import MAX_AGAIN, SETTLING_S
from elastic_moe.cluster.decisions.replacing import room
from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.facts.events import (
    PlaceRequested,
    PlanReady,
    RebalanceRequested,
    ScaleRequested,
    Solve,
    SubjectChanged,
    Tick,
    Unpin,
)
from elastic_moe.cluster.messages.views import Phase
from tests.cluster.simulation import EXPERTS, LAYERS, Simulation, shuffled
from tests.cluster.stories import PART, W0, newest, sent, serving


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
    assert sim.state.counters.rebalances == {"completed": 0, "failed": 0, "skipped": 1, "undone": 0}
    sim.feed(RebalanceRequested(planner="auto"))
    answer(sim, worthwhile=False, no_worse=True)
    assert sim.facts.change is not None


@pytest.mark.parametrize("stage", ["planning", "copying"])
def test_a_periodic_re_placement_ends_before_the_scaling_that_is_asked_for_meanwhile(stage: str) -> None:
    sim = serving(2, interval_s=5.0)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    sim.now += 10
    sim.feed(Tick())
    if stage == "copying":
        answer(sim, worthwhile=True, no_worse=True)
        assert sim.facts.change is not None
    sim.feed(ScaleRequested(workers=1, operation_id="mine"))
    sim.settle()
    assert sim.facts.ranks == (W0,)
    operation = sim.state.operations.get("mine")
    assert operation is not None
    assert operation.phase is Phase.COMPLETED


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


def test_repeated_skipped_plans_are_one_line_of_history() -> None:
    sim = serving(2, interval_s=5.0)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    for _ in range(20):
        sim.now += 10
        sim.feed(Tick())
        answer(sim, worthwhile=False, no_worse=True)
    assert [operation.kind for operation in sim.state.operations.all()] == ["rebalance", "start"]
    assert sim.state.counters.rebalances["skipped"] == 20


def test_nothing_is_planned_without_counts() -> None:
    sim = serving(2, interval_s=5.0)
    sim.now += 100
    sim.feed(Tick())
    assert not sent(sim, Solve)


def test_a_plan_that_needs_more_memory_than_there_is_is_refused() -> None:
    sim = serving(2, capacity=PART + 1)
    assert sim.facts.spec is not None
    placement = sim.facts.spec.placement
    turned = np.roll(placement.physical_to_logical_map, 4, axis=1)
    with pytest.raises(PlacementError, match="memory for 13 experts"):
        sim.feed(PlaceRequested(placement=replace(placement, physical_to_logical_map=turned)))
    assert room(sim.facts) == 1


def test_a_given_placement_is_applied_and_pinned() -> None:
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
    for _ in range(1 + MAX_AGAIN):
        sim.finish(0, fault=True)
        sim.now += 10
        sim.feed(Tick())
    assert newest(sim).phase is Phase.FAILED
    assert sim.facts.spec.placement == before
    assert not sim.facts.pinned


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_pin_that_is_taken_back_while_its_placement_is_under_way_never_comes(interrupted: bool) -> None:
    sim = serving(2, interval_s=3.0)
    assert sim.facts.spec is not None
    placement = shuffled(sim.facts.spec.placement, sim.rng)
    sim.feed(PlaceRequested(placement=placement, pinned=True))
    if interrupted:
        sim.lose_engine()
    sim.feed(Unpin())
    sim.settle()
    assert (sim.facts.spec.placement, sim.facts.pinned) == (placement, False)


def test_a_placement_of_other_workers_is_refused() -> None:
    sim, other = serving(2), serving(3)
    assert other.facts.spec is not None
    with pytest.raises(PlacementError, match="w0 with 4 slots, w1 with 4 slots"):
        sim.feed(PlaceRequested(placement=other.facts.spec.placement))


# --- The decisions alone ------------------------------------------------------------------------------------------


def test_a_change_of_subject_is_answered_at_once_and_looked_at_whole_soon_after() -> None:
    sim = serving(2, interval_s=600.0)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    sim.feed(SubjectChanged())
    assert [solve.planner for solve in sent(sim, Solve)] == ["relief"]
    answer(sim, worthwhile=True, no_worse=True)
    assert sim.facts.change is not None
    assert "the subject of the traffic has changed" in newest(sim).reason
    sim.settle()
    sim.log.clear()
    sim.feed(Tick())
    assert not sent(sim, Solve)
    for look, after_s in enumerate(SETTLING_S):
        sim.now += after_s
        sim.feed(Tick())
        assert [(solve.planner, solve.settling) for solve in sent(sim, Solve)] == [(None, True)] * (look + 1)
        answer(sim, worthwhile=True, no_worse=True)
        sim.settle()
    sim.now += 2 * SETTLING_S[-1]
    sim.feed(Tick())
    assert len(sent(sim, Solve)) == len(SETTLING_S), "after these looks the interval is the usual one"


def test_looks_whose_time_came_while_something_else_was_under_way_are_one() -> None:
    sim = serving(2, interval_s=600.0)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    sim.feed(SubjectChanged(first=True))
    assert "the first subject is known" in newest(sim).reason
    sim.now += SETTLING_S[-1] + 1
    answer(sim, worthwhile=False, no_worse=True)
    sim.log.clear()
    for _ in range(2):
        sim.feed(Tick())
    assert [solve.settling for solve in sent(sim, Solve)] == [True]


@pytest.mark.parametrize("why", ["on request only", "pinned", "planning", "lone"])
def test_a_change_of_subject_waits_where_the_placement_must_stay(why: str) -> None:
    sim = serving(1 if why == "lone" else 2, interval_s=0.0 if why == "on request only" else 600.0)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    if why == "pinned":
        assert sim.facts.spec is not None
        sim.feed(PlaceRequested(placement=sim.facts.spec.placement, pinned=True))
    if why == "planning":
        sim.feed(RebalanceRequested(planner="auto"))
    sim.log.clear()
    sim.feed(SubjectChanged())
    assert not [solve for solve in sent(sim, Solve) if solve.planner == "relief"]
