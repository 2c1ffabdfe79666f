"""What the control plane does when several of its parts are concerned."""

import pytest

from elastic_moe.cluster.control.state import ControlState
from elastic_moe.cluster.errors import ConflictError, NotReadyError
from elastic_moe.cluster.facts.events import (
    AbortSteps,
    Prepare,
    RebalanceRequested,
    ScaleRequested,
    StartWorker,
    StepFailed,
    StopWorker,
    Transfer,
    WorkerLost,
)
from elastic_moe.cluster.messages.views import Phase
from tests.cluster.simulation import LAYERS, Simulation, info
from tests.cluster.stories import W0, W1, W2, newest, sent, serving


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
    assert StopWorker(worker=W1, info=info(W1)) in sim.log
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


def test_a_restarted_coordinator_says_that_it_asks_the_workers() -> None:
    sim = serving(2)
    sim.restart_coordinator(flipped=0.0)
    with pytest.raises(NotReadyError, match="asking the workers what they have"):
        sim.state.handle(RebalanceRequested(planner="auto"), sim.now)


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


def test_the_reason_for_no_change_is_given() -> None:
    sim = serving(2)
    assert sim.state.reasons.starts == "there are as many workers as there should be"
    assert sim.state.reasons.members == "2 workers can serve"
    sim.feed(StepFailed(epoch=sim.facts.epoch, suspects=(), reason="aborted"))
    assert sim.state.reasons.members == "workers are being asked for a sign of life"
