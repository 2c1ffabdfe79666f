"""What the control plane says of itself."""

from dataclasses import replace

import pytest

from elastic_moe.cluster.decisions.status import readiness
from elastic_moe.cluster.facts.events import ScaleRequested
from elastic_moe.cluster.facts.facts import Cause, Facts, Outage
from elastic_moe.cluster.facts.operations import OperationLog
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.views import OperationKind
from tests.cluster.stories import IDLE, PART, W0, W1, facts_of, member, newest, serving, team


def test_a_retired_worker_may_be_terminated_once_it_is_out_of_use() -> None:
    sim = serving(3)
    sim.feed(ScaleRequested(retire=(W0,)))
    seen = [sim.state.progress(newest(sim))]
    sim.finish(0)
    seen.append(sim.state.progress(newest(sim)))
    sim.feed(IDLE)
    while sim.todo:
        seen.append(sim.state.progress(newest(sim)))
        sim.finish(0)
    seen.append(sim.state.progress(newest(sim)))
    assert seen == [(0.5, False), (0.7, False), (0.8, False), (0.9, False), (1.0, True)]
    assert newest(sim).retiring == (W0,)


OUTAGE = Outage(reason="worker w1 lost", cause=Cause.WORKER, since=0.0)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (facts_of([member(W0, loaded_at=None)]), "starting, 0 of 1 worker ready"),
        (team(W0), "serving"),
        (team(W0, outage=OUTAGE), "recovering, 1 of 1 worker ready: worker w1 lost"),
        (facts_of(fatal="shard 3 is damaged"), "shard 3 is damaged"),
        (
            facts_of([member(W0, capacity=PART)], [W0, W1], outage=OUTAGE, target=2),
            "recovering, 1 of 2 workers ready: worker w1 lost; those left have memory for 4 of 8 experts per layer:"
            " waiting for a replacement",
        ),
    ],
)
def test_readiness_names_what_it_waits_for(facts: Facts, reason: str) -> None:
    told = readiness(facts, None)
    assert (told.reason, told.ready) == (reason, reason == "serving")
    assert (told.error is not None) == (facts.fatal is not None)


def test_readiness_names_the_last_obstacle() -> None:
    operation = OperationLog().open(OperationKind.RECOVER, Epoch(2), "w1 lost")
    told = readiness(team(W0, outage=OUTAGE), replace(operation, error="a copy failed"))
    assert told.reason.endswith("; last attempt: a copy failed")
