"""A cluster that ends: API replicas are told to refuse new requests, and may be taken back."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from elastic_moe.actors import liveness
from elastic_moe.actors.departure import Departure
from elastic_moe.cluster.control.succession import SWITCH_S, UNUSED_S

MustRefuse = Callable[[Departure, int, bool, float], bool]


@pytest.fixture
def must_refuse() -> Iterator[MustRefuse]:
    """What the only API replica is told."""
    with asyncio.Runner() as runner:
        yield lambda departure, *report: runner.run(departure.check_in("one", *report))


@pytest.fixture(autouse=True)
def _short_check_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "CHECK_IN_S", 0.01)


def test_a_stop_counts_requests_until_the_last_has_ended(must_refuse: MustRefuse) -> None:
    departure = Departure(replicas=1)
    assert not must_refuse(departure, 2, False, 0.0)
    assert departure.stop_requests(0.0) == 2
    assert must_refuse(departure, 2, True, 1.0)
    assert must_refuse(departure, 0, True, 2.0)
    assert departure.stop_requests(2.0) == 0


def test_a_cluster_that_gives_way_ends_after_its_last_request_and_may_be_taken_back(must_refuse: MustRefuse) -> None:
    departure = Departure(replicas=1)
    must_refuse(departure, 1, False, 0.0)
    assert not departure.look(replaced=True, most_s=60.0, now=0.0).value
    assert departure.replaced
    departure.give_way(0.0)
    assert not must_refuse(departure, 1, False, SWITCH_S - 1), "Serve still sends requests here"
    assert not departure.look(replaced=True, most_s=60.0, now=SWITCH_S).value
    assert must_refuse(departure, 1, True, SWITCH_S)
    departure.take_back()
    assert not departure.replaced
    assert not must_refuse(departure, 1, False, SWITCH_S + 1)
    departure.look(replaced=True, most_s=60.0, now=SWITCH_S + 1)
    departure.give_way(SWITCH_S + 1)
    must_refuse(departure, 0, True, SWITCH_S + 2)
    assert departure.look(replaced=True, most_s=60.0, now=SWITCH_S + 2).value


def test_a_cluster_that_no_replica_uses_ends_if_it_is_replaced() -> None:
    departure = Departure(replicas=1)
    assert not departure.look(replaced=True, most_s=60.0, now=0.0).value
    assert departure.look(replaced=True, most_s=60.0, now=UNUSED_S).value
    assert not departure.look(replaced=False, most_s=60.0, now=UNUSED_S + 1).value
