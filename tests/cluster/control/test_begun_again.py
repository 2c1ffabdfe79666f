"""A re-placement that a user asked for is begun again where something dies or fails under it."""

import numpy as np
import pytest

from elastic_moe.cluster.control.rebalancing import MAX_AGAIN
from elastic_moe.cluster.errors import ConflictError
from elastic_moe.cluster.facts.events import (
    PlaceRequested,
    RebalanceRequested,
    Solve,
    StartWorker,
    StepFailed,
    Tick,
    Transfer,
    WorkerLost,
)
from elastic_moe.cluster.facts.facts import Stage
from elastic_moe.cluster.facts.operations import ENDED
from elastic_moe.cluster.messages.views import Operation, Phase
from tests.cluster.simulation import EXPERTS, LAYERS, Simulation, shuffled
from tests.cluster.stories import W1, newest, sent, serving


@pytest.mark.parametrize("asked", ["a planner", "a placement"])
@pytest.mark.parametrize("stage", [Stage.PLANNING, Stage.TRANSFERRING, Stage.PREPARING])
def test_what_was_asked_for_outlives_the_coordinator(asked: str, stage: Stage) -> None:
    sim = serving(2)
    assert sim.facts.spec is not None
    before = sim.facts.spec.placement
    wanted = shuffled(before, sim.rng)
    if asked == "a planner":
        sim.feed(RebalanceRequested(planner="round_robin"))
    else:
        sim.feed(PlaceRequested(placement=wanted, pinned=True))
    asked_for = newest(sim).operation_id
    while stage is not Stage.PLANNING and (sim.facts.change is None or sim.facts.change.stage is not stage):
        sim.finish(0)
    if sim.facts.change is not None:
        wanted = sim.facts.change.goal
    for _ in range(3):
        sim.restart_coordinator(flipped=0.0)
        assert newest(sim).error == "the coordinator was restarted"
        with pytest.raises(ConflictError, match=asked_for):
            sim.feed(RebalanceRequested(planner="auto"))
    sim.settle()
    operation = sim.state.operations.get(asked_for)
    assert operation is not None
    assert (operation.phase, operation.error) == (Phase.COMPLETED, None)
    assert sim.state.counters.rebalances == {"completed": 1, "failed": 0, "skipped": 0, "undone": 0}
    if asked == "a planner" and stage is Stage.PLANNING:
        assert sim.facts.spec.placement != before
    else:
        assert sim.facts.spec.placement == wanted
    assert sim.facts.pinned == (asked == "a placement")


@pytest.mark.parametrize("counted", [True, False])
def test_a_planner_that_is_asked_again_waits_for_counts(counted: bool) -> None:
    sim = serving(2)
    sim.feed(RebalanceRequested(planner="auto"))
    sim.restart_coordinator(flipped=0.0)
    sim.finish(0)
    sim.count(np.zeros((LAYERS, EXPERTS), dtype=np.int64))
    sim.now += 5
    sim.feed(Tick())
    assert len(sent(sim, Solve)) == 1
    if counted:
        sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    else:
        sim.now += 6
    sim.feed(Tick())
    assert len(sent(sim, Solve)) == 2


def test_what_nobody_asked_for_ends_with_the_coordinator() -> None:
    sim = serving(2, interval_s=5.0)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    sim.now += 10
    sim.feed(Tick())
    sim.restart_coordinator(flipped=0.0)
    assert (newest(sim).phase, newest(sim).error) == (Phase.FAILED, "the coordinator was restarted")
    assert sim.facts.planning is None


def test_a_re_placement_that_ends_each_coordinator_is_given_up() -> None:
    sim = serving(2)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    sim.feed(RebalanceRequested(planner="auto"))
    for _ in range(MAX_AGAIN):
        sim.restart_coordinator(flipped=0.0)
        assert newest(sim).phase is Phase.PREPARING
        # one that only waits is to blame for nothing
        sim.restart_coordinator(flipped=0.0)
        sim.finish(0)
        assert isinstance(sim.todo[0], Solve)
    sim.restart_coordinator(flipped=0.0)
    why = "the coordinator was restarted; before, it was begun again 3 times"
    assert (newest(sim).phase, newest(sim).error) == (Phase.FAILED, why)


@pytest.mark.parametrize("asked", ["a planner", "a placement"])
@pytest.mark.parametrize("restarts", [0, 1])
def test_what_was_asked_for_outlives_a_worker_that_joins(asked: str, restarts: int) -> None:
    """It came in between, and what was accepted failed."""
    sim = serving(3)
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    while not sim.facts.serves:
        sim.finish(next(n for n, command in enumerate(sim.todo) if not isinstance(command, StartWorker)))
    sim.now += 10
    sim.feed(Tick())
    assert any(isinstance(command, StartWorker) for command in sim.todo)
    assert sim.facts.spec is not None
    if asked == "a planner":
        sim.feed(RebalanceRequested(planner="auto"))
    else:
        sim.feed(PlaceRequested(placement=shuffled(sim.facts.spec.placement, sim.rng)))
    asked_for = newest(sim).operation_id
    for _ in range(restarts):
        sim.restart_coordinator(flipped=0.0)
    # the new worker is ready before anything else
    sim.todo.sort(key=lambda command: not isinstance(command, StartWorker))
    sim.settle()
    operation = sim.state.operations.get(asked_for)
    assert operation is not None
    assert operation.phase is Phase.COMPLETED, operation.error
    assert len(sim.facts.ranks) == 3


def ask(sim: Simulation, asked: str) -> str:
    """Returns the id of the operation."""
    assert sim.facts.spec is not None
    if asked == "a planner":
        sim.feed(RebalanceRequested(planner="round_robin"))
    else:
        sim.feed(PlaceRequested(placement=shuffled(sim.facts.spec.placement, sim.rng), pinned=True))
    return newest(sim).operation_id


def reach(sim: Simulation, stage: Stage) -> None:
    while stage is not Stage.PLANNING and (sim.facts.change is None or sim.facts.change.stage is not stage):
        sim.finish(0)


def ended(sim: Simulation, operation_id: str) -> Operation:
    """The operation, once everything has settled."""
    sim.settle()
    operation = sim.state.operations.get(operation_id)
    assert operation is not None
    assert operation.phase in ENDED
    return operation


STAGES = [Stage.PLANNING, Stage.TRANSFERRING, Stage.PREPARING, Stage.COMMITTING]


@pytest.mark.parametrize("asked", ["a planner", "a placement"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_was_asked_for_outlives_the_engine(asked: str, stage: Stage) -> None:
    sim = serving(3)
    operation = ask(sim, asked)
    reach(sim, stage)
    wanted = None if sim.facts.change is None else sim.facts.change.goal
    sim.lose_engine()
    told = sim.state.operations.get(operation)
    assert told is not None
    if wanted is not None or asked == "a planner":
        assert told.error == "the engine is lost: died"
    assert ended(sim, operation).phase is Phase.COMPLETED
    assert sim.state.counters.rebalances == {"completed": 1, "failed": 0, "skipped": 0, "undone": 0}
    assert sim.facts.spec is not None
    assert wanted is None or sim.facts.spec.placement == wanted
    assert sim.facts.pinned == (asked == "a placement")


@pytest.mark.parametrize("found", ["by itself", "by what failed", "after a step failed"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_planner_is_asked_again_where_a_worker_is_lost(stage: Stage, found: str) -> None:
    """Its plan, if there was one, was for other workers."""
    sim = serving(3)
    operation = ask(sim, "a planner")
    reach(sim, stage)
    sim.kill(W1)
    if found == "after a step failed":
        sim.feed(StepFailed(epoch=sim.facts.epoch, suspects=(W1,), reason="aborted"))
    if found == "by itself":
        sim.feed(WorkerLost(worker=W1, reason="died"))
    told = ended(sim, operation)
    assert (told.phase, told.reason.count("drawn")) == (Phase.COMPLETED, 1)
    assert len(sent(sim, Solve)) >= 2 or stage is Stage.PLANNING
    assert sim.state.counters.rebalances["completed"] == 1
    assert sim.state.counters.rebalances["failed"] == 0
    assert (len(sim.facts.ranks), W1 in sim.facts.ranks) == (3, False)


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_given_placement_ends_with_a_worker_that_it_names(restarts: int) -> None:
    sim = serving(3)
    operation = ask(sim, "a placement")
    sim.kill(W1)
    if restarts:
        sim.restart_coordinator(flipped=0.0)
    else:
        sim.feed(WorkerLost(worker=W1, reason="died"))
    told = ended(sim, operation)
    assert told.phase is Phase.FAILED
    assert told.error is not None
    assert told.error.startswith("placement: workers: expected w0 with ")
    assert not sim.facts.pinned
    assert sim.settled


@pytest.mark.parametrize("stage", [Stage.TRANSFERRING, Stage.PREPARING, Stage.COMMITTING])
def test_what_fails_for_no_reason_of_a_workers_is_tried_again_after_a_pause(stage: Stage) -> None:
    sim = serving(3)
    operation = ask(sim, "a placement")
    reach(sim, stage)
    assert sim.facts.change is not None
    wanted = sim.facts.change.goal
    sim.finish(0, fault=True)
    assert not [command for command in sim.todo if isinstance(command, Transfer)], "it waits"
    assert ended(sim, operation).phase is Phase.COMPLETED
    assert sim.facts.spec is not None
    assert sim.facts.spec.placement == wanted


def test_a_re_placement_that_ends_every_engine_is_given_up() -> None:
    sim = serving(2)
    operation = ask(sim, "a placement")
    for lives in range(1 + MAX_AGAIN):
        told = sim.state.operations.get(operation)
        assert told is not None
        assert told.phase is Phase.PREPARING, lives
        reach(sim, Stage.TRANSFERRING)
        sim.lose_engine()
        while not sim.facts.serves:
            sim.finish(0)
    told = ended(sim, operation)
    assert (told.phase, told.error) == (
        Phase.FAILED,
        "the engine is lost: died; before, it was begun again 3 times",
    )


def test_what_waits_keeps_other_re_placements_out() -> None:
    sim = serving(3)
    operation = ask(sim, "a planner")
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    while not sim.facts.serves:
        sim.finish(0)
    with pytest.raises(ConflictError, match=operation):
        sim.feed(RebalanceRequested(planner="auto"))
