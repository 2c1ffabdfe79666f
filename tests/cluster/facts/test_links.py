"""Ports and uplinks from the rates between pairs."""

from elastic_moe.cluster.facts.links import port_rates, uplink_rates
from elastic_moe.cluster.placement import Worker, WorkerId

W = [WorkerId(f"w{n}") for n in range(4)]


def workers(*nodes: str) -> list[Worker]:
    return [Worker(id=worker, node=node, slots=1) for worker, node in zip(W, nodes, strict=False)]


def test_a_slow_port_slows_all_its_pairs_and_nobody_elses() -> None:
    three = workers("a", "b", "c")
    rates = {W[0]: {W[1]: 9.0, W[2]: 0.1}, W[1]: {W[0]: 9.5, W[2]: 0.1}, W[2]: {W[0]: 0.1, W[1]: 0.12}}
    assert port_rates(three, rates) == (9.5, 9.5, 0.12)
    assert uplink_rates(three, rates) == (9.5, 9.5, 0.12)


def test_workers_of_a_node_share_its_uplink() -> None:
    four = workers("a", "a", "b", "b")
    inside, across = 40.0, 5.0
    rates = {
        one: {other: inside if (m < 2) == (n < 2) else across for n, other in enumerate(W) if n != m}
        for m, one in enumerate(W)
    }
    assert port_rates(four, rates) == (40.0,) * 4
    assert uplink_rates(four, rates) == (10.0, 10.0)


def test_what_one_of_two_has_measured_holds_for_both() -> None:
    assert port_rates(workers("a", "b"), {W[0]: {W[1]: 3.0}}) == (3.0, 3.0)


def test_nothing_is_claimed_unless_all_is_known() -> None:
    assert port_rates(workers("a", "b", "c"), {W[0]: {W[1]: 3.0}}) == ()
    assert uplink_rates(workers("a", "b", "c"), {W[0]: {W[1]: 3.0}}) == ()
    assert uplink_rates(workers("a", "a"), {W[0]: {W[1]: 3.0}}) == (), "one node has nothing beyond its uplink"
    assert port_rates(workers("a"), {}) == ()
