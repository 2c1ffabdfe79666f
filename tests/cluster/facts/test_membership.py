import numpy as np
import pytest

from elastic_moe.cluster.facts.events import Probe, StartWorker, StopWorker
from elastic_moe.cluster.facts.membership import ENDED_REMEMBERED, Membership, needs, serves
from elastic_moe.cluster.messages.views import WorkerState
from elastic_moe.cluster.placement import WorkerId
from tests.cluster.simulation import EXPERTS, LAYERS, info
from tests.cluster.stories import W0, W1, placement_of

ALL = np.ones((LAYERS, EXPERTS), dtype=bool)


@pytest.fixture
def two() -> Membership:
    """W0 has loaded every expert, W1 loads."""
    membership = Membership((LAYERS, EXPERTS))
    membership.start(ALL, 1.0)
    membership.start(ALL, 1.0)
    assert membership.loads(info(W0), 2.0)
    return membership


def test_a_worker_holds_what_it_was_to_load_once_it_has(two: Membership) -> None:
    assert two[W0].held.all()
    assert (two[W0].loaded_at, two[W0].loaded, two.loaded) == (2.0, True, (W0,))
    assert not two[W1].has.any()
    assert not two.loads(info(W0), 3.0), "it is no news"
    assert not two.loads(info(WorkerId("w9")), 3.0), "nobody has asked for it"
    assert two.start(ALL, 4.0) == StartWorker(worker=WorkerId("w2"), experts=(tuple(range(EXPERTS)),) * LAYERS)


def test_an_earlier_look_stays_as_it_was(two: Membership) -> None:
    before = two.records
    two.stage([(W0, 0, 1)])
    two.stop(W1)
    assert not before[W0].staged.any()
    assert before[W1].alive


def test_transferred_experts_are_held_from_the_next_epoch_on_or_dropped(two: Membership) -> None:
    two.loads(info(W1), 2.0)
    two.stage([(W1, 0, 1), (W1, 2, 3)])
    assert np.argwhere(two[W1].staged).tolist() == [[0, 1], [2, 3]]
    two.unstage([W1])
    assert not two[W1].staged.any()
    two.stage([(W1, 0, 1)])
    placement = placement_of(W0, W1)
    two.join(placement)
    assert two[W1].state is WorkerState.SERVING
    assert np.array_equal(two[W1].held, needs(placement, W1))
    assert not two[W1].staged.any()
    two.doubt(placement_of(W1, W0))
    assert not two[W1].held.any(), "what it holds in either of two epochs"
    assert np.array_equal(two[W1].perhaps_serves, serves(placement_of(W1, W0), W1))  # type: ignore[arg-type]
    two.join(placement)
    assert two[W1].perhaps_serves is None, "the outcome is known again"


def test_nothing_is_counted_on_at_a_dead_worker(two: Membership) -> None:
    two.stage([(W0, 0, 1)])
    assert two.stop(W0) == StopWorker(worker=W0, info=info(W0))
    assert not two[W0].has.any()
    assert two.loaded == ()


def test_some_of_the_dead_are_remembered_and_those_in_use(two: Membership) -> None:
    for _ in range(2 * ENDED_REMEMBERED):
        two.stop(two.start(ALL, 0.0).worker)
    two.stop(W1)
    two.forget_ended({W1})
    dead = [member.id for member in two.records.values() if not member.alive]
    assert len(dead) == ENDED_REMEMBERED + 1
    assert W1 in dead


def test_strikes_are_counted_until_they_are_forgiven(two: Membership) -> None:
    assert [two.strike(W0), two.strike(W0), two.strike(WorkerId("w9"))] == [1, 2, 0]
    two.forgive()
    assert two.strike(W0) == 1


def test_a_leaving_worker_may_stay_after_all(two: Membership) -> None:
    two.drain(W0, 5.0, retired=True)
    assert (two[W0].state, two[W0].draining_since, two[W0].retired) == (WorkerState.DRAINING, 5.0, True)
    two.keep(W0)
    assert two[W0].state is WorkerState.SERVING


def test_after_a_restart_those_that_load_are_asked_again(two: Membership) -> None:
    assert [command.worker for command in two.resume(100.0)] == [W1]
    assert (two[W0].loaded_at, two[W1].loaded_at, two[W1].asked_at) == (100.0, None, 100.0)
    assert two.probe() == Probe(workers=(W0,))
    assert two.probing
