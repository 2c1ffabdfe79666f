"""What the coordinator writes into the log of a change, and tells of a pin."""

from __future__ import annotations

import logging

import pytest

from elastic_moe.actors.coordinator.views import Outline, log_changes, placement_view
from elastic_moe.cluster.facts.events import PlaceRequested, Probed, StepFailed, WorkerLost
from elastic_moe.cluster.messages.epochs import Epoch
from tests.cluster.simulation import Simulation, shuffled
from tests.cluster.stories import W1, newest, serving


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def fed(sim: Simulation, event: StepFailed | Probed) -> None:
    before = Outline.of(sim.state)
    sim.feed(event)
    log_changes(before, sim.state)


def test_a_killed_worker_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """There were three: of the step, by the engine and by the coordinator, and of the worker."""
    caplog.set_level(logging.INFO)
    sim = serving(2)
    fed(sim, StepFailed(epoch=Epoch(1), suspects=(W1,), reason="w1: its connection has ended"))
    assert not warned(caplog)
    fed(sim, Probed(lost=((W1, "it is dead"),)))
    [line] = warned(caplog)
    assert line == (
        "epoch 1 does not serve: a step failed: w1: its connection has ended; requests wait for the recovery"
    )


@pytest.mark.parametrize("fails", [False, True])
def test_an_operation_that_will_pin_the_placement_is_told_until_it_ends(fails: bool) -> None:
    sim = serving(2)
    before = placement_view(sim.state)
    sim.feed(PlaceRequested(placement=shuffled(before.placement, sim.rng), pinned=True))
    under_way = placement_view(sim.state)
    assert (under_way.pinned, under_way.pinned_by) == (False, newest(sim).operation_id)
    if fails:
        # it names a worker that is lost
        sim.feed(WorkerLost(worker=W1, reason="it is dead"))
    sim.settle()
    after = placement_view(sim.state)
    assert (after.pinned, after.pinned_by) == (not fails, None)
