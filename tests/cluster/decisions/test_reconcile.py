"""Who is started, and who serves: the choices alone, and in a pretended cluster."""

import numpy as np
import pytest

from elastic_moe.cluster.decisions.reconcile import (
    JOIN_PATIENCE_S,
    SURVIVORS_FIRST_S,
    kept,
    next_members,
    recovers_alone,
    shares,
    starts,
    wish,
)
from elastic_moe.cluster.facts.events import Commit, Prepare, ScaleRequested, StartWorker, Tick, Transfer, WorkerLost
from elastic_moe.cluster.facts.facts import Cause, Choice, Outage
from elastic_moe.cluster.facts.membership import WorkerRecord
from elastic_moe.cluster.messages.views import OperationKind, Phase, WorkerState
from elastic_moe.cluster.placement import EMPTY, WorkerId
from tests.cluster.simulation import EXPERTS, LAYERS, Simulation
from tests.cluster.stories import PART, W0, W1, W2, facts_of, member, newest, sent, serving, team


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


def test_spare_slots_are_shared_out_and_empty_until_a_planner_fills_them() -> None:
    sim = serving(2, redundant=4)
    assert sim.facts.spec is not None
    placement = sim.facts.spec.placement
    assert [worker.slots for worker in placement.workers] == [6, 6]
    assert (placement.physical_to_logical_map == EMPTY).sum() == LAYERS * 4


def test_a_surplus_worker_stays_when_another_dies() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=1))
    sim.kill(W0)
    sim.feed(WorkerLost(worker=W0, reason="died"))
    sim.settle()
    assert sim.facts.ranks == (W1,)
    assert not sent(sim, StartWorker)


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


# --- The choices alone --------------------------------------------------------------------------------------------


def names(choice: Choice[tuple[WorkerRecord, ...]]) -> tuple[WorkerId, ...]:
    return tuple(m.id for m in choice.value)


def test_no_change_begins_when_the_cluster_is_as_wanted() -> None:
    choice = next_members(team(W0, W1), 0.0)
    assert (names(choice), choice.reason) == ((), "2 workers can serve")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"probing": True}, "asked for a sign of life"),
        ({"retry_at": 5.0}, "after a pause"),
        ({"spec": None}, "1 of 2 workers have loaded"),
    ],
)
def test_reasons_to_begin_no_change_yet(facts: dict[str, object], reason: str) -> None:
    loads = member(W1, WorkerState.STARTING, loaded_at=None)
    choice = next_members(facts_of([member(W0), loads], [W0], **{"target": 2, **facts}), 1.0)
    assert names(choice) == ()
    assert reason in choice.reason


@pytest.mark.parametrize(("now", "joins"), [(JOIN_PATIENCE_S + 0.9, False), (JOIN_PATIENCE_S + 1.0, True)])
def test_a_worker_that_has_loaded_waits_for_others_to_join_with(now: float, joins: bool) -> None:
    members = [member(W0), member(W1, WorkerState.STARTING, loaded_at=1.0), member(W2, loaded_at=None)]
    choice = next_members(facts_of(members, [W0], target=3), now)
    assert names(choice) == ((W0, W1) if joins else ())


@pytest.mark.parametrize(("now", "begun"), [(2.0, ()), (1.0 + JOIN_PATIENCE_S, (W0, W2))])
def test_a_waiting_worker_joins_where_the_others_need_its_memory(now: float, begun: tuple[WorkerId, ...]) -> None:
    """W1 is to leave, and W0 alone cannot hold every expert: without W2, which waits, nothing is to be begun."""
    members = [
        member(W0, capacity=PART),
        member(W1, WorkerState.DRAINING, capacity=PART, retired=True),
        member(W2, WorkerState.STARTING, loaded_at=1.0, capacity=PART),
    ]
    assert names(next_members(facts_of(members, [W0, W1], target=3), now)) == begun


def test_survivors_serve_first() -> None:
    outage = Outage(reason="w1 lost", cause=Cause.WORKER, since=0.0)
    members = [member(W0), member(W1, WorkerState.DEAD), member(W2, WorkerState.STARTING)]
    facts = facts_of(members, [W0, W1], outage=outage, target=2)
    assert names(next_members(facts, 0.0)) == (W0,)
    assert recovers_alone(facts, SURVIVORS_FIRST_S - 0.1)
    assert not recovers_alone(facts, SURVIVORS_FIRST_S)
    assert wish(facts, [members[0]]).value is OperationKind.RECOVER
    assert wish(facts, [members[0]]).reason == "w1 to leave"


def test_surplus_workers_are_kept_unless_retired_by_name() -> None:
    leave = [member(w, WorkerState.DRAINING, retired=w == W1) for w in (W1, W2)]
    assert kept(facts_of([member(W0), *leave], [W0, W1, W2], target=3)) == (W2,)
    assert kept(facts_of([member(W0), *leave], [W0, W1, W2], target=1)) == ()


@pytest.mark.parametrize(
    ("facts", "count", "reason"),
    [
        ({}, 2, "1 of 3 workers are there"),
        ({"target": 1}, 0, "as many workers as there should be"),
        ({"start_at": 2.0}, 0, "after a pause"),
        ({"outage": Outage(reason="", cause=Cause.STEP, since=0.0)}, 0, "survivors serve again first"),
    ],
)
def test_how_many_are_started_and_why(facts: dict[str, object], count: int, reason: str) -> None:
    choice = starts(facts_of([member(W0)], [W0], **{"target": 3, **facts}), 1.0)
    assert len(choice.value) == count
    assert reason in choice.reason


def test_new_workers_load_lost_experts_first_and_then_an_even_share() -> None:
    held = np.zeros((LAYERS, EXPERTS), dtype=bool)
    held[:, :4] = True
    first, second = shares(facts_of([member(W0, held=held)], [W0], target=3), 2)
    assert (first | second)[:, 4:].all()
    assert not (first & second).any()
    assert first.sum(axis=1).tolist() == second.sum(axis=1).tolist() == [2] * LAYERS
