"""Where workers may run, and what they wait for."""

import pytest

from elastic_moe.cluster.nodes import Node, all_cores, homes, shortage, threads


def node(name: str, *, cpu: float = 0, gpu: float = 0, free: float | None = None, **facts: bool) -> Node:
    """free: of whichever it has; all of it unless given."""
    total = {"CPU": cpu, "GPU": gpu}
    return Node(id=name, total=total, free=total if free is None else dict.fromkeys(total, free), **facts)


HEAD = node("head", cpu=4, head=True)
SMALL, LARGE, BUSY = node("small", cpu=2), node("large", cpu=8), node("busy", cpu=4, free=0)
GPUS = node("gpus", cpu=8, gpu=2)


@pytest.mark.parametrize(
    ("nodes", "device", "on_head", "expected"),
    [
        ([HEAD, SMALL], "cpu", False, "small"),
        ([HEAD, SMALL], "cpu", True, "head small"),
        ([HEAD, node("leaves", cpu=2, drains=True)], "cpu", False, ""),
        ([HEAD, GPUS, SMALL], "cuda", False, "gpus"),
        ([node("all", cpu=4, gpu=1, head=True)], "cuda", False, "all"),
    ],
)
def test_where_workers_may_run(nodes: list[Node], device: str, on_head: bool, expected: str) -> None:
    assert " ".join(home.id for home in homes(nodes, device, on_head=on_head)) == expected


@pytest.mark.parametrize(
    ("nodes", "device", "expected"),
    [
        ([HEAD, SMALL], "cpu", None),
        ([HEAD, BUSY], "cpu", "a CPU core: none of the cluster's 4 is free"),
        ([HEAD], "cpu", "a CPU core on a node that is not the head: the cluster has none"),
        ([node("head", head=True)], "cpu", "a CPU core: the cluster has none"),
        ([HEAD, SMALL], "cuda", "a GPU: the cluster has none"),
        ([HEAD, GPUS], "cuda", None),
        ([HEAD, node("gpus", gpu=2, free=0)], "cuda", "a GPU: none of the cluster's 2 is free"),
    ],
)
def test_what_the_next_worker_waits_for(nodes: list[Node], device: str, expected: str | None) -> None:
    words = shortage(nodes, device, on_head=False)
    assert words is expected is None or (words or "").startswith(expected or "?")


def test_threads_are_those_of_the_smallest_node() -> None:
    assert threads([LARGE, SMALL]) == 2
    assert threads([]) == 1


def test_nodes_that_leave_have_no_cores_for_more() -> None:
    nodes = [
        Node(id="a", head=True, total={"CPU": 2}),
        Node(id="b", total={"CPU": 8.5}),
        Node(id="c", total={"GPU": 1}),
    ]
    assert all_cores([*nodes, Node(id="d", total={"CPU": 64}, drains=True)]) == 10
