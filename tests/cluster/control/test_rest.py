"""No worker is kept without requests, and what brings them back."""

import pytest

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.facts.events import Event, LoadSeen, ScaleRequested
from elastic_moe.cluster.messages.views import Phase
from tests.cluster.simulation import EXPERTS, LAYERS, Simulation
from tests.cluster.stories import IDLE, W0, W1, newest, redeployed, serving


def idle(sim: Simulation, seconds: int) -> None:
    for _ in range(seconds):
        sim.now += 1.0
        sim.feed(IDLE)
        while sim.todo:
            sim.finish(0)


ASKED = LoadSeen(waiting=1, running=0, kv_usage=0.0)


def test_without_requests_no_worker_is_kept_and_the_next_request_brings_them_back() -> None:
    sim = serving(1, least=0, most=3)
    idle(sim, 299)
    assert sim.facts.ranks == (W0,)
    idle(sim, 3)
    assert not sim.workers[W0].alive
    assert sim.state.readiness().reason.startswith("at rest: no worker is kept")
    assert (sim.state.readiness().ready, sim.state.operations.find_open()) == (True, None)
    idle(sim, 1000)
    assert list(sim.workers) == [W0]

    sim.feed(ASKED)
    assert sim.state.readiness().reason == "starting, 0 of 1 worker ready"
    assert newest(sim).reason == "back to 1 worker: there is a request"
    sim.settle()
    assert sim.facts.ranks == (W1,)
    assert not any(sim.state.counters.recoveries.values())


def test_a_request_that_comes_before_the_rest_keeps_the_workers() -> None:
    sim = serving(1, least=0, most=3)
    sim.feed(ScaleRequested(workers=0))
    sim.feed(LoadSeen(waiting=0, running=1, kv_usage=0.1, busy=(W0,)))
    sim.settle()
    assert (sim.facts.ranks, sim.facts.target, sim.state.operations.find_open()) == ((W0,), 1, None)


@pytest.mark.parametrize("wish", [ScaleRequested(workers=1, replace=True), redeployed(workers=1, max_workers=3)])
def test_a_scaling_that_takes_back_the_rest_ends_as_its_workers_are_there(wish: Event) -> None:
    sim = serving(2, least=0, most=3)
    sim.feed(ScaleRequested(workers=1))
    sim.settle()
    sim.feed(ScaleRequested(workers=0))
    sim.feed(wish)
    assert newest(sim).phase is Phase.COMPLETED
    assert (sim.facts.ranks, sim.state.operations.find_open()) == ((W0,), None)
    sim.feed(ScaleRequested(workers=2))
    sim.settle()
    assert len(sim.facts.ranks) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cluster_rests_if_its_workers_die_while_none_is_wanted(workers: int) -> None:
    sim = serving(workers, least=0, most=3, capacity=LAYERS * EXPERTS // workers)
    sim.kill(W0)
    sim.feed(ScaleRequested(workers=0))
    sim.settle()
    assert sim.facts.rests
    assert sim.state.readiness().reason.startswith("at rest: no worker is kept")
    assert sim.state.operations.find_open() is None
    sim.feed(LoadSeen(waiting=1, running=0, kv_usage=0.0, busy=()))
    sim.settle()
    assert len(sim.facts.ranks) == workers


@pytest.mark.parametrize("event", ["engine", "restart", "scale"])
def test_what_ends_a_rest(event: str) -> None:
    sim = serving(2, least=0, most=3)
    sim.feed(ScaleRequested(workers=0))
    idle(sim, 2)
    assert not any(worker.alive for worker in sim.workers.values())
    if event == "engine":
        sim.lose_engine()
    elif event == "restart":
        sim.restart_coordinator(flipped=0.0)
        assert sim.state.readiness().ready, "it rests on"
        sim.feed(ASKED)
    else:
        sim.feed(ScaleRequested(workers=2))
    sim.settle()
    assert len(sim.facts.ranks) == 2


def test_who_does_not_allow_it_keeps_a_worker() -> None:
    sim = serving(1, most=3)
    idle(sim, 2000)
    assert sim.facts.ranks == (W0,)
    with pytest.raises(PlacementError, match="expected 1 to 3"):
        sim.feed(ScaleRequested(workers=0))


@pytest.mark.parametrize("wish", [ScaleRequested(workers=1), redeployed(workers=1, max_workers=3)])
def test_a_rest_does_not_forget_how_much_memory_workers_have(wish: Event) -> None:
    """One worker would wait for another one without end, and no scaling is taken while nothing is served."""
    sim = serving(2, least=0, most=3, capacity=LAYERS * EXPERTS // 2)
    sim.feed(ScaleRequested(workers=0))
    idle(sim, 2)
    assert sim.facts.rests
    with pytest.raises(PlacementError, match="expected at least 2"):
        sim.feed(wish)
    sim.feed(ASKED)
    sim.settle()
    assert len(sim.facts.ranks) == 2
