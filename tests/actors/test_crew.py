"""When all API replicas have finished their requests, and which of them is the last one."""

from __future__ import annotations

from elastic_moe.actors.crew import Crew
from elastic_moe.actors.liveness import AWAY_S


def test_requests_are_left_until_every_replica_refuses_and_has_none() -> None:
    crew = Crew(2)
    crew.check_in("one", 2, False, 0.0)
    crew.check_in("two", 0, False, 0.0)
    assert crew.left(0.0) == 3, "the second one may still accept a request"
    assert crew.left(0.5) == 3, "what it counted before the stop says nothing, however old it is"
    crew.check_in("two", 1, True, 0.5)
    assert crew.left(0.5) == 3, "it had accepted one after its last report"
    crew.check_in("one", 1, True, 0.6)
    crew.check_in("two", 0, True, 0.6)
    assert crew.left(0.6) == 1
    crew.check_in("one", 0, True, 0.7)
    assert crew.left(0.7) == 0


def test_a_replica_that_is_gone_holds_nothing_up_for_ever() -> None:
    crew = Crew(2)
    crew.check_in("one", 5, False, 0.0)
    crew.check_in("two", 0, False, AWAY_S)
    assert crew.left(AWAY_S) == 6, "it may be slow to hear of the stop"
    crew.check_in("two", 0, True, AWAY_S + 1)
    assert crew.left(2 * AWAY_S - 1) == 5
    crew.check_in("two", 0, True, 2 * AWAY_S)
    assert crew.left(2 * AWAY_S) == 0


def test_a_replica_that_was_gone_long_before_the_stop_holds_nothing_up() -> None:
    crew = Crew(1)
    crew.check_in("one", 5, False, 0.0)
    crew.check_in("its successor", 0, False, 1000.0)
    crew.check_in("its successor", 0, True, 1000.1)
    assert crew.left(1000.1) == 0


def test_a_new_coordinator_gives_the_replicas_time_to_check_in() -> None:
    crew = Crew(2)
    assert crew.left(100.0) == 2
    crew.check_in("one", 3, False, 101.0)
    assert crew.left(101.0) == 4
    crew.check_in("one", 0, True, 102.0)
    assert crew.left(102.0) == 1
    crew.check_in("one", 0, True, 100.0 + AWAY_S)
    assert crew.left(100.0 + AWAY_S) == 0


def test_the_last_one_is_told_that_it_is() -> None:
    crew = Crew(2)
    crew.check_in("one", 0, False, 0.0)
    crew.check_in("two", 0, False, 0.0)
    assert crew.check_out("one", 1.0) == 1
    assert crew.check_out("two", 1.0) == 0
