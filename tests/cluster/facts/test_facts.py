from dataclasses import FrozenInstanceError

import pytest

from elastic_moe.cluster.facts.facts import ControlSettings
from elastic_moe.cluster.messages.views import WorkerState
from tests.cluster.stories import PART, W0, W1, W2, facts_of, member, team


def test_facts_are_not_changed() -> None:
    facts = team(W0)
    with pytest.raises(FrozenInstanceError):
        facts.target = 2  # type: ignore[misc]


def test_a_worker_that_loads_is_taken_to_have_the_memory_that_others_have() -> None:
    loads = member(W1, WorkerState.STARTING, loaded_at=None)
    assert facts_of([loads]).limits([loads]) == [8]
    assert facts_of([loads], settings=ControlSettings(workers=1, expert_capacity=PART)).limits([loads]) == [4]
    members = [member(W0, capacity=PART), loads, member(W2, capacity=2 * PART)]
    assert facts_of(members).limits(members) == [4, 4, 8]


def test_the_fewest_that_hold_every_expert() -> None:
    members = [member(W0, capacity=PART), member(W1, capacity=PART), member(W2, capacity=2 * PART)]
    assert facts_of(members).fewest == 1
    assert facts_of(members[:2]).fewest == 2
    assert facts_of([]).fewest == 1
    assert not facts_of(members).fits(members[:1])


def test_a_cluster_is_whole_with_all_workers_and_none_leaving() -> None:
    assert team(W0, W1).whole
    assert not team(W0, W1, target=3).whole
    assert not team(W0, W1, probing=True).whole
    assert not facts_of([member(W0), member(W1, WorkerState.DRAINING)], [W0, W1]).scaled
