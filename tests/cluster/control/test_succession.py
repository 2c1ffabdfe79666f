"""The hand-over from one cluster to the next."""

import pytest

from elastic_moe.cluster.control.succession import SWITCH_S, UNUSED_S, Succession, asks_for_way


def looks(succession: Succession, now: float, **facts: object) -> bool:
    told = {"replaced": True, "replicas": 1, "running": 1, "most_s": 30.0, "now": now, **facts}
    return succession.look(**told).value  # type: ignore[arg-type]


def test_the_old_cluster_serves_until_no_replica_uses_it() -> None:
    old = Succession()
    assert not looks(old, 0.0, replaced=False)
    assert not looks(old, 1000.0)
    assert not looks(old, 2000.0, replicas=0)
    assert not looks(old, 2001.0), "a replica was only late to check in"
    assert not looks(old, 2002.0, replicas=0)
    assert not looks(old, 2001.9 + UNUSED_S, replicas=0)
    assert looks(old, 2002.0 + UNUSED_S, replicas=0)


def test_one_that_gives_way_finishes_its_requests_first() -> None:
    old = Succession()
    old.give_way(10.0)
    old.give_way(30.0)
    assert not looks(old, 11.0)
    assert looks(old, 12.0, running=0)
    assert not looks(old, 39.9)
    assert looks(old, 40.0), "they had their time, from the first request on"


def test_one_that_gives_way_refuses_requests_only_where_they_go_on_coming() -> None:
    old = Succession()
    assert not old.refuses(1000.0)
    old.give_way(10.0)
    assert not old.refuses(10.0)
    assert old.refuses(10.0 + SWITCH_S)


def test_one_that_is_wanted_again_stays() -> None:
    old = Succession()
    old.give_way(0.0)
    assert not looks(old, 99.0, replaced=False)
    assert not looks(old, 100.0)
    assert old.gives_way_since is None


@pytest.mark.parametrize(
    ("serves", "waited_s", "value", "reason"),
    [
        (True, 500.0, False, "it can serve"),
        (False, 0.0, False, "it has the resources"),
        (False, 119.0, False, "it waits for resources, at most 120 s"),
        (False, 120.0, True, "it has waited 120 s"),
    ],
)
def test_the_new_cluster_asks_for_way_where_it_waits_for_resources_in_vain(
    serves: bool, waited_s: float, value: bool, reason: str
) -> None:
    choice = asks_for_way(serves=serves, waited_s=waited_s, patience_s=120.0)
    assert choice.value is value
    assert choice.reason.startswith(reason)
