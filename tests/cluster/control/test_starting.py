"""Workers that die while they load."""

from elastic_moe.cluster.control.starting import Starts
from elastic_moe.cluster.facts.events import Tick, Transfer, WorkerFailed
from elastic_moe.cluster.messages.views import Phase
from tests.cluster.simulation import Simulation
from tests.cluster.stories import W0, W1, W2, newest, sent


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


def test_a_replacement_at_the_start_loads_its_predecessors_experts() -> None:
    sim = Simulation(workers=2)
    sim.feed(Tick())
    sim.finish(0, fault=True)
    sim.settle()
    assert sim.facts.ranks == (W1, W2)
    assert not sent(sim, Transfer)


def test_the_pause_after_a_start_that_failed_doubles_until_one_succeeds() -> None:
    starts = Starts()
    waits = []
    for _ in range(3):
        assert starts.failed(W0, "out of memory", 100.0) is None
        waits.append(starts.at - 100.0)
    assert waits == [0.5, 1.0, 2.0]
    assert "w0 died while it loaded the model: out of memory" in (starts.failed(W0, "out of memory", 100.0) or "")
    starts.succeeded()
    assert starts.failed(W0, "out of memory", 100.0) is None
    assert starts.at == 100.5
