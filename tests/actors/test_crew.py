"""When all API replicas have finished their requests, and which of them is the last one."""

from __future__ import annotations

from elastic_moe.actors.crew import AWAY_S, Crew


def test_requests_are_left_until_every_replica_knows_and_has_none() -> None:
    crew = Crew()
    crew.check_in("one", 2, 0.0)
    crew.check_in("two", 0, 0.0)
    assert crew.left(0.0) == 3, "the second one may still accept a request"
    crew.told("one")
    crew.told("two")
    assert crew.left(0.0) == 2
    crew.check_in("one", 1, 0.1)
    crew.check_in("two", 0, 0.1)
    assert crew.left(0.1) == 1
    crew.check_in("one", 0, 0.2)
    assert crew.left(0.2) == 0


def test_a_replica_that_is_gone_holds_nothing_up() -> None:
    crew = Crew()
    crew.check_in("one", 5, 0.0)
    crew.check_in("two", 0, AWAY_S)
    crew.told("two")
    assert crew.left(AWAY_S) == 0


def test_the_last_one_is_told_that_it_is() -> None:
    crew = Crew()
    crew.check_in("one", 0, 0.0)
    crew.check_in("two", 0, 0.0)
    assert crew.check_out("one", 1.0) == 1
    assert crew.check_out("two", 1.0) == 0
