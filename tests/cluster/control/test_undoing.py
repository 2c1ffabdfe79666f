"""A re-placement that has made steps longer is undone by the control plane, and no other change is."""

import numpy as np
import pytest

from elastic_moe.cluster.facts.events import (
    PlaceRequested,
    PlanReady,
    RebalanceRequested,
    ScaleRequested,
    Solve,
    Tick,
    Unpin,
    Weigh,
    Weighed,
)
from elastic_moe.cluster.messages.views import OperationKind, Phase
from elastic_moe.cluster.placement import Placement
from tests.cluster.simulation import EXPERTS, LAYERS, Simulation, shuffled
from tests.cluster.stories import newest, redeployed, sent, serving

INTERVAL_S = 60.0


def in_force(sim: Simulation) -> Placement:
    assert sim.facts.spec is not None
    return sim.facts.spec.placement


def replaced(sim: Simulation, planner: str = "auto") -> tuple[Placement, Placement]:
    """Have a plan carried out on request. Returns the placements before and after."""
    before = in_force(sim)
    sim.feed(RebalanceRequested(planner=planner))
    (solve,) = (sim.todo.pop(),)
    assert isinstance(solve, Solve)
    after = shuffled(before, sim.rng)
    sim.feed(PlanReady(ticket=solve.ticket, placement=after, worthwhile=True, no_worse=True, reason="gain 9 %"))
    sim.settle()
    assert in_force(sim) == after
    return before, after


def at_end_of_window(sim: Simulation, seconds: float = INTERVAL_S) -> Weigh | None:
    """Let a window pass. Returns the command to weigh, if one was given."""
    sim.log.clear()
    sim.now += seconds
    sim.feed(Tick())
    weigh = next(iter(sent(sim, Weigh)), None)
    assert weigh is None or isinstance(weigh, Weigh)
    sim.todo = [command for command in sim.todo if not isinstance(command, Weigh)]
    return weigh


def answer(sim: Simulation, weigh: Weigh, harm: float) -> None:
    before_s = (1.0,) * len(weigh.before)
    sim.feed(Weighed(ticket=weigh.ticket, present_s=1.0 + harm, before_s=before_s, tokens=500))


@pytest.mark.parametrize("planner", ["auto", "random"])
def test_harm_is_undone_with_the_reason(planner: str) -> None:
    sim = serving(2, interval_s=INTERVAL_S)
    before, _ = replaced(sim, planner)
    done = newest(sim).operation_id
    weigh = at_end_of_window(sim)
    assert weigh is not None
    assert weigh.before == (before,)
    answer(sim, weigh, 0.05)
    sim.settle()
    assert in_force(sim) == before
    undo = newest(sim)
    assert (undo.kind, undo.phase) == (OperationKind.REBALANCE, Phase.COMPLETED)
    assert undo.reason.startswith(f"{done} had made steps 5.0% longer on the 500 tokens of the window since")
    assert sim.state.counters.rebalances["undone"] == 1
    assert at_end_of_window(sim) is None, "to undo is not on trial"


def test_no_harm_is_kept_and_settled_after_two_windows() -> None:
    sim = serving(2, interval_s=INTERVAL_S)
    _, after = replaced(sim)
    for _ in range(2):
        weigh = at_end_of_window(sim)
        assert weigh is not None
        answer(sim, weigh, -0.05)
    assert at_end_of_window(sim) is None
    assert in_force(sim) == after


def test_a_look_at_the_placement_waits_until_the_last_change_was_weighed() -> None:
    sim = serving(2, interval_s=INTERVAL_S)
    sim.count(np.ones((LAYERS, EXPERTS), dtype=np.int64))
    replaced(sim)
    weigh = at_end_of_window(sim)
    assert weigh is not None
    sim.feed(Tick())
    assert not sent(sim, Solve)
    answer(sim, weigh, 0.0)
    sim.feed(Tick())
    assert sent(sim, Solve)


@pytest.mark.parametrize("why", ["on request only", "given", "pinned", "scaled"])
def test_nothing_else_is_on_trial(why: str) -> None:
    sim = serving(2, interval_s=0.0 if why == "on request only" else INTERVAL_S)
    _, after = replaced(sim)
    if why == "given":
        sim.feed(PlaceRequested(placement=shuffled(after, sim.rng)))
    if why == "pinned":
        sim.feed(PlaceRequested(placement=after, pinned=True))
    if why == "scaled":
        sim.feed(ScaleRequested(workers=3))
    sim.settle()
    assert at_end_of_window(sim) is None
    sim.feed(Unpin())
    assert at_end_of_window(sim) is None


def test_prices_that_come_while_something_else_has_begun_are_asked_for_again() -> None:
    sim = serving(2, interval_s=INTERVAL_S)
    before, after = replaced(sim)
    weigh = at_end_of_window(sim)
    assert weigh is not None
    sim.feed(RebalanceRequested(planner="auto"))
    answer(sim, weigh, 0.5)
    assert in_force(sim) == after
    solve = sim.todo.pop()
    assert isinstance(solve, Solve)
    sim.feed(PlanReady(ticket=solve.ticket, placement=None, worthwhile=False, no_worse=False, reason="none"))
    again = at_end_of_window(sim, 0.0)
    assert again is not None
    answer(sim, again, 0.5)
    sim.settle()
    assert in_force(sim) == before


def test_a_restarted_coordinator_goes_on_with_the_trial() -> None:
    sim = serving(2, interval_s=INTERVAL_S)
    before, _ = replaced(sim)
    assert at_end_of_window(sim) is not None
    sim.restart_coordinator(flipped=0.0)
    sim.settle()
    weigh = at_end_of_window(sim)
    assert weigh is not None
    answer(sim, weigh, 0.05)
    sim.settle()
    assert in_force(sim) == before


def test_what_does_not_fit_beside_the_present_experts_is_not_undone() -> None:
    sim = serving(2, interval_s=INTERVAL_S, capacity=2 * LAYERS * EXPERTS)
    _, after = replaced(sim)
    weigh = at_end_of_window(sim)
    assert weigh is not None
    for record in sim.facts.records.values():
        assert record.info is not None
        object.__setattr__(record.info, "expert_capacity", LAYERS * EXPERTS // 2)
    answer(sim, weigh, 0.5)
    sim.settle()
    assert in_force(sim) == after
    assert "it would hold" in (newest(sim).error or "")


@pytest.mark.parametrize("end", ["redeploy", "pin"])
def test_prices_that_come_when_trials_have_ended_are_ignored(end: str) -> None:
    """They failed the control plane."""
    sim = serving(2, interval_s=INTERVAL_S)
    _, after = replaced(sim)
    weigh = at_end_of_window(sim)
    assert weigh is not None
    if end == "redeploy":
        sim.feed(redeployed(workers=2, rebalance_interval_s=0.0))
    else:
        sim.feed(PlaceRequested(placement=after, pinned=True))
        sim.feed(Tick())
        sim.feed(Unpin())
    answer(sim, weigh, 0.5)
    sim.settle()
    assert in_force(sim) == after
