"""Whether a planner is asked, what becomes of its plan, and what memory allows."""

from dataclasses import replace

import numpy as np
import pytest

from elastic_moe.cluster.decisions.replacing import Judgement, judge, room, too_much, worth_a_look
from elastic_moe.cluster.facts.events import PlanReady
from elastic_moe.cluster.facts.facts import Choice, Planning
from elastic_moe.cluster.facts.membership import needs
from elastic_moe.cluster.placement import WorkerId
from tests.cluster.simulation import EXPERTS, LAYERS, shuffled
from tests.cluster.stories import PART, W0, W1, facts_of, member, placement_of, team


@pytest.mark.parametrize(
    ("ranks", "facts", "reason"),
    [
        ((W0, W1), {}, None),
        ((W0, W1), {"load": np.zeros((LAYERS, EXPERTS), dtype=np.int64)}, "nothing was counted"),
        ((W0, W1), {"pinned": True}, "pinned"),
        ((W0,), {}, "a lone worker"),
    ],
)
def test_whether_to_ask_a_planner(ranks: tuple[WorkerId, ...], facts: dict[str, object], reason: str | None) -> None:
    look = worth_a_look(team(*ranks, **{"load": np.ones((LAYERS, EXPERTS), dtype=np.int64), **facts}))
    assert look.value is (reason is None)
    assert (reason or "periodic look") in look.reason


@pytest.mark.parametrize(
    ("requested", "forced", "worthwhile", "no_worse", "judgement", "reason"),
    [
        (False, False, True, True, Judgement.ADOPTED, "gain 1 %"),
        (False, False, False, True, Judgement.KEPT, "placement kept, gain 1 %"),
        (True, False, False, True, Judgement.ADOPTED, "carried out, although gain 1 %"),
        (True, False, False, False, Judgement.KEPT, "placement kept, gain 1 %"),
        (True, True, False, False, Judgement.ADOPTED, "carried out, although gain 1 %"),
    ],
)
def test_what_becomes_of_a_plan(
    requested: bool, forced: bool, worthwhile: bool, no_worse: bool, judgement: Judgement, reason: str
) -> None:
    facts = team(W0, W1)
    planning = Planning(ticket=1, operation_id="rebalance-1", since=0.0, requested=requested, forced=forced)
    placement = shuffled(placement_of(W0, W1), np.random.default_rng(0))
    plan = PlanReady(ticket=1, placement=placement, worthwhile=worthwhile, no_worse=no_worse, reason="gain 1 %")
    assert judge(facts, planning, plan) == Choice(judgement, reason)
    assert judge(facts, planning, replace(plan, placement=placement_of(W0, W1))).value is Judgement.KEPT
    for useless in (None, placement_of(W0), placement_of(W1, W0)):
        assert judge(facts, planning, replace(plan, placement=useless)) == Choice(Judgement.REFUSED, "gain 1 %")


def test_a_plan_needs_the_memory_for_what_comes_beside_what_is_there() -> None:
    placement = placement_of(W0, W1)
    members = [member(w, held=needs(placement, w), capacity=PART + 1) for w in (W0, W1)]
    facts = facts_of(members, [W0, W1])
    turned = replace(placement, physical_to_logical_map=np.roll(placement.physical_to_logical_map, 4, axis=1))
    assert too_much(facts, placement) is None
    assert "w0 has memory for 13 experts, and while they move it would hold 24" in (too_much(facts, turned) or "")
    assert room(facts) == 1
    assert room(team(W0, W1)) is None
    full = [member(w, held=needs(placement, w), capacity=PART, disk=1e6) for w in (W0, W1)]
    assert room(facts_of(full, [W0, W1])) is None, "the disk takes what memory does not"
    assert too_much(facts_of(full, [W0, W1]), turned) is None
