"""Workers that cannot join: they do not keep the others from serving, and are given up with the reason."""

from elastic_moe.cluster.control.starting import JOIN_PAUSE_S, MAX_JOIN_PAUSE_S, Starts
from elastic_moe.cluster.decisions.joining import MAX_JOINS, blamed, together
from elastic_moe.cluster.facts.events import ScaleRequested, StartWorker, StopWorker, Tick
from elastic_moe.cluster.facts.facts import Cause, Outage
from elastic_moe.cluster.messages.views import Phase, WorkerState
from elastic_moe.cluster.placement import WorkerId
from tests.cluster.simulation import Simulation
from tests.cluster.stories import W0, W1, W2, facts_of, member, newest, sent, serving, team

W3 = WorkerId("w3")


def run(sim: Simulation, seconds: int) -> None:
    """Everything under way ends, second by second."""
    for _ in range(seconds):
        while sim.todo:
            sim.finish(0)
        sim.now += 1.0
        sim.feed(Tick())


def set_apart(sim: Simulation, *workers: WorkerId) -> None:
    for worker in workers:
        sim.workers[worker].apart = True


def test_a_worker_that_cannot_join_is_given_up_and_the_others_serve_on() -> None:
    sim = serving(2)
    sim.feed(ScaleRequested(workers=3, operation_id="more"))
    set_apart(sim, W2)
    run(sim, 20)
    assert sim.facts.serves
    assert sim.facts.ranks == (W0, W1)
    operation = sim.state.operations.get("more")
    assert operation is not None
    assert operation.phase is Phase.FAILED
    assert operation.error == f"w2 could not join the others in {MAX_JOINS} attempts: a peer did not come"
    assert [command.worker for command in sent(sim, StopWorker)] == [W2]  # type: ignore[attr-defined]
    # another is started, but not at once
    assert [command.worker for command in sent(sim, StartWorker)] == [W2]  # type: ignore[attr-defined]
    run(sim, round(JOIN_PAUSE_S))
    assert sim.facts.ranks == (W0, W1, W3)
    assert newest(sim).phase is Phase.COMPLETED


def test_one_that_cannot_join_keeps_no_other_from_joining() -> None:
    sim = serving(1)
    sim.feed(ScaleRequested(workers=3))
    set_apart(sim, W1)
    run(sim, 5)
    assert sim.facts.ranks == (W0, W2)


def test_a_start_goes_on_with_those_that_can() -> None:
    sim = Simulation(workers=3)
    sim.feed(Tick())
    set_apart(sim, W0)
    run(sim, 5)
    assert sim.facts.serves, "one worker alone needs nobody"
    run(sim, 60)
    assert len(sim.facts.ranks) >= 1
    assert sim.facts.serves


def test_survivors_that_cannot_reach_one_another_serve_alone() -> None:
    sim = serving(3)
    set_apart(sim, W1, W2)
    sim.kill(W0)
    sim._find_lost([W0])
    run(sim, 5)
    assert sim.facts.serves
    assert len(sim.facts.ranks) == 1


def test_who_is_tried_together() -> None:
    fresh = [member(worker, WorkerState.STARTING) for worker in (W1, W2)]
    once = [member(worker, WorkerState.STARTING, failed_joins=1) for worker in (W1, W2)]
    alone = team(W0)
    zero = alone.records[W0]
    assert together(alone, [zero, *fresh]) == [zero, *fresh]
    assert together(alone, [zero, *once]) == [zero, once[0]], "one by one after a failure"
    assert together(alone, [zero, once[0], fresh[1]]) == [zero, fresh[1]], "new ones first"
    assert together(alone, [zero]) == [zero]
    # before the first epoch, and in an outage
    start = facts_of([])
    assert together(start, once) == once
    twice = [member(W0, failed_joins=3), member(W1, failed_joins=2), member(W2, failed_joins=2)]
    assert together(start, twice) == [twice[1]]
    assert together(start, []) == []


def test_a_smallest_group_still_has_memory_for_every_expert() -> None:
    twice = [member(worker, failed_joins=2, capacity=12) for worker in (W0, W1, W2)]
    assert together(facts_of([]), twice) == twice[:2]


def test_members_that_serve_are_not_to_blame() -> None:
    assert blamed(team(W0), (W0, W1)) == [W1]
    outage = Outage(reason="", cause=Cause.STEP, since=0.0)
    assert blamed(team(W0, W1, outage=outage), (W0, W1)) == [W0, W1]
    assert blamed(facts_of([]), (W0, W1)) == [W0, W1]


def test_pauses_between_workers_that_cannot_join_double() -> None:
    starts = Starts()
    pauses = []
    for _ in range(8):
        starts.could_not_join(100.0)
        pauses.append(starts.at - 100.0)
    assert pauses[:3] == [JOIN_PAUSE_S, 2 * JOIN_PAUSE_S, 4 * JOIN_PAUSE_S]
    assert pauses[-1] == MAX_JOIN_PAUSE_S
    starts.joined()
    starts.could_not_join(100.0)
    assert starts.at == 100.0 + JOIN_PAUSE_S
