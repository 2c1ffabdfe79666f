"""Workers that move to nodes that have come after them."""

import pytest

from elastic_moe.cluster.decisions.spreading import relocations, replaced, stranded
from elastic_moe.cluster.facts.events import HomesSeen, StartWorker, StopWorker, Tick, WorkerFailed
from elastic_moe.cluster.facts.facts import Facts
from elastic_moe.cluster.facts.homes import SETTLED_S, Homes
from elastic_moe.cluster.messages.views import Phase
from elastic_moe.cluster.placement import WorkerId
from tests.cluster.simulation import Simulation, info
from tests.cluster.stories import W0, W1, W2, facts_of, member, newest, sent, serving

W3 = WorkerId("w3")


def on(**nodes: str) -> Facts:
    """Facts of workers that serve. nodes: where each one runs."""
    ids = [WorkerId(worker) for worker in nodes]
    return facts_of([member(worker, info=info(worker, nodes[worker])) for worker in ids], ids)


@pytest.mark.parametrize(
    ("facts", "fresh", "expected"),
    [
        (on(w0="a", w1="a"), {"b": 4}, {"w1": "b"}),
        (on(w0="a", w1="a"), {"b": 4, "c": 4}, {"w1": "b"}),
        (on(w0="a", w1="a", w2="a", w3="a"), {"b": 4}, {"w3": "b", "w2": "b"}),
        (on(w0="a", w1="a", w2="a", w3="a"), {"b": 1}, {"w3": "b"}),
        (on(w0="a", w1="a", w2="a", w3="a"), {"b": 4, "c": 4, "d": 4}, {"w3": "b", "w2": "c", "w1": "d"}),
        (on(w0="a", w1="b", w2="b"), {"c": 4}, {"w2": "c"}),
        (on(w0="a", w1="b"), {"c": 4}, {}),
        (on(w0="a"), {"b": 4}, {}),
        (on(w0="a", w1="a"), {}, {}),
    ],
)
def test_as_few_move_as_even_the_nodes_out(facts: Facts, fresh: dict[str, int], expected: dict[str, str]) -> None:
    assert {move.worker: move.node for move in relocations(facts, fresh, 0.0).value} == expected


@pytest.mark.parametrize("busy", [{"target": 3}, {"pinned": True}, {"start_at": 1.0}, {"probing": True}])
def test_nobody_moves_while_something_is_under_way(busy: dict[str, object]) -> None:
    members = [member(worker, info=info(worker, "a")) for worker in (W0, W1)]
    assert not relocations(facts_of(members, [W0, W1], **busy), {"b": 4}, 0.0).value


def test_a_worker_leaves_once_another_has_loaded_in_its_place() -> None:
    def facts(**third: object) -> Facts:
        moving = [member(W0), member(W1, moves=True), *([member(W2, **third)] if third else [])]  # type: ignore[arg-type]
        return facts_of(moving, [W0, W1], target=2)

    assert (replaced(facts(loaded_at=None)), stranded(facts(loaded_at=None))) == ((), ())
    assert (replaced(facts(loaded_at=1.0)), stranded(facts(loaded_at=1.0))) == ((W1,), ())
    assert (replaced(facts()), stranded(facts())) == ((), (W1,))


def test_a_node_is_new_until_a_worker_has_run_on_it() -> None:
    homes = Homes()
    homes.use(["a"])
    homes.seen({"a": 2, "b": 4}, 100.0)
    assert not homes.fresh(100.0 + SETTLED_S / 2), "others may come"
    homes.seen({"a": 2, "b": 3}, 104.0)
    assert homes.fresh(100.0 + SETTLED_S) == {"b": 3}
    homes.use(["b"])
    assert not homes.fresh(1000.0), "workers have left it: its machine may be given back"


# --- In the whole -------------------------------------------------------------------------------------------------


def with_a_node_more(workers: int, cores: int = 4) -> Simulation:
    """All workers on one node, when another has come."""
    sim = serving(workers)
    sim.feed(HomesSeen(free={"n0": 1, "later": cores}))
    sim.now += SETTLED_S
    sim.feed(Tick())
    return sim


def test_workers_spread_over_a_node_that_has_come_and_serve_meanwhile() -> None:
    sim = with_a_node_more(2)
    assert [(start.worker, start.node) for start in sent(sim, StartWorker)] == [(W2, "later")]  # type: ignore[attr-defined]
    assert sim.facts.ranks == (W0, W1)
    assert sim.draining == (), "requests go to both"
    sim.settle()
    assert {worker: sim.facts.records[worker].info.node for worker in sim.facts.ranks} == {W0: "n0", W2: "later"}  # type: ignore[union-attr]
    assert [stop.worker for stop in sent(sim, StopWorker)] == [W1]  # type: ignore[attr-defined]
    assert sim.facts.epoch == 2, "one epoch in all"
    assert newest(sim).phase is Phase.COMPLETED
    assert newest(sim).reason.startswith("w2 to join, w1 to leave, as workers spread over nodes that have come")
    sim.now += 1000
    sim.feed(Tick())
    assert len(sent(sim, StartWorker)) == 1


def test_who_was_to_move_stays_if_the_new_node_cannot_serve() -> None:
    sim = with_a_node_more(2)
    sim.todo.clear()
    sim.feed(WorkerFailed(worker=W2, reason="no such directory: /models/m"))
    sim.now += 1000
    sim.feed(Tick())
    sim.settle()
    assert sim.facts.ranks == (W0, W1)
    assert not sim.facts.moving
    assert len(sent(sim, StartWorker)) == 1, "it is not tried again and again"


def test_who_was_to_move_stays_for_one_that_died() -> None:
    sim = with_a_node_more(3)
    sim.kill(W0)
    sim._find_lost([W0])
    sim.settle()
    assert sim.facts.ranks == (W1, W2, W3)
    assert not sim.facts.moving
