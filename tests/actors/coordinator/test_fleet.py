"""Where Ray is asked to put the actors."""

from collections.abc import Mapping
from typing import Any

import pytest

from elastic_moe.actors.coordinator import fleet as fleets
from elastic_moe.actors.coordinator.fleet import NODE_ID, RayFleet
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.nodes import Node
from elastic_moe.cluster.placement import WorkerId
from elastic_moe.cluster.redeploy import Generation

HEAD = Node(id="head", head=True, total={"CPU": 4}, free={"CPU": 4})
FULL = Node(id="full", total={"CPU": 4}, free={"CPU": 0.5})
ROOMY = Node(id="roomy", total={"CPU": 4, "GPU": 1}, free={"CPU": 2.5, "GPU": 1})


@pytest.fixture(autouse=True)
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets.ray_nodes, "nodes", lambda: (HEAD, FULL, ROOMY))
    monkeypatch.setattr(fleets.ray_nodes, "head_id", lambda: HEAD.id)


def fleet(monkeypatch: pytest.MonkeyPatch, *, alone: bool = False, **settings: Any) -> tuple[RayFleet, dict[str, Any]]:
    """With the options of the last actor that was made."""
    made: dict[str, Any] = {}

    def create(self: RayFleet, cls: type, name: str, options: Mapping[str, Any], *rest: Any) -> None:
        made.clear()
        made.update(options)

    monkeypatch.setattr(RayFleet, "_create", create)
    return RayFleet(ServeConfig(**settings), Generation("g"), alone=alone, worker_class=object), made


@pytest.mark.parametrize(
    ("settings", "node", "expected"),
    [
        ({}, None, {"scheduling_strategy": "SPREAD", "label_selector": {NODE_ID: "!head"}}),
        ({"workers_on_head": True}, None, {"scheduling_strategy": "SPREAD"}),
        (
            {},
            "roomy",
            {"label_selector": {NODE_ID: "roomy"}, "fallback_strategy": [{"label_selector": {NODE_ID: "!head"}}]},
        ),
        (
            {"workers_on_head": True},
            "roomy",
            {"label_selector": {NODE_ID: "roomy"}, "fallback_strategy": [{"label_selector": {NODE_ID: "!roomy"}}]},
        ),
    ],
)
def test_workers_on_cpus_are_spread_and_stay_off_the_head(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], node: str | None, expected: dict[str, Any]
) -> None:
    maker, made = fleet(monkeypatch, device="cpu", **settings)
    maker.start_worker(WorkerId("w0"), node)
    assert made == {"max_restarts": 0, "num_cpus": 1, **expected}


def test_workers_of_a_ray_of_our_own_and_on_gpus_are_where_ray_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    maker, made = fleet(monkeypatch, device="cpu", alone=True, fork_workers=False)
    maker.start_worker(WorkerId("w0"))
    assert made == {"max_restarts": 0, "num_cpus": 0}
    maker, made = fleet(monkeypatch, device="cuda")
    maker.start_worker(WorkerId("w0"))
    assert made == {"max_restarts": 0, "num_gpus": 1.0, "num_cpus": 0}


def test_nodes_with_room_for_a_worker_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fleet(monkeypatch, device="cpu")[0].free_cores() == {"roomy": 2}
    assert fleet(monkeypatch, device="cpu", workers_on_head=True)[0].free_cores() == {"head": 4, "roomy": 2}
    assert fleet(monkeypatch, device="cuda")[0].free_cores() == {}, "workers on GPUs share none"
    assert fleet(monkeypatch, device="cpu", alone=True)[0].free_cores() == {}


def test_workers_of_all_groups_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one GPU, and there are two groups of two workers."""
    maker, made = fleet(monkeypatch, alone=True, device="cuda", workers=2, data_parallel_size=2)
    assert (maker.gpu_workers, maker.shared_gpus) == (4, True)
    maker.start_worker(WorkerId("w0"))
    assert made["num_gpus"] == 0.25


@pytest.mark.parametrize(
    ("name", "groups", "called_for", "last", "expected"),
    [
        ("g", 1, None, "g", True),
        ("g", 1, None, None, True),
        ("g", 1, None, "other", False),
        ("g.1", 2, None, "g", True),
        ("g.1", 2, None, "other", False),
        ("g.1", 1, None, "g", False),
        ("g.1", 1, 2, "g", True),
        ("g.1", 2, 1, "g", False),
    ],
)
def test_a_group_ends_with_its_cluster_or_when_there_are_to_be_fewer(
    monkeypatch: pytest.MonkeyPatch, name: str, groups: int, called_for: int | None, last: str | None, expected: bool
) -> None:
    """`groups` are configured; an admin call has asked for `called_for`."""
    monkeypatch.setattr(fleets.generations, "wanted", lambda: last)
    monkeypatch.setattr(fleets.generations, "number_of_groups", lambda _, configured: called_for or configured)
    assert RayFleet(ServeConfig(), Generation(name)).wanted(groups) is expected


def test_groups_of_one_cluster_are_not_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {Generation(name): name for name in ("g", "g.1", "g.2", "other", "other.1")}
    monkeypatch.setattr(fleets.generations, "coordinators", lambda: found)
    assert RayFleet(ServeConfig(), Generation("g.1")).others() == ["other", "other.1"]


@pytest.mark.parametrize(
    ("alone", "settings"),
    [(False, {}), (True, {"device": "cuda"}), (True, {"fork_workers": False}), (False, {"fork_workers": True})],
)
def test_processes_are_forked_on_cpus_of_one_machine_alone(
    monkeypatch: pytest.MonkeyPatch, alone: bool, settings: dict[str, Any]
) -> None:
    maker, made = fleet(monkeypatch, alone=alone, **{"device": "cpu", **settings})
    maker.start_worker(WorkerId("w0"))
    assert "runtime_env" not in made
    maker, made = fleet(monkeypatch, alone=True, device="cpu")
    maker.start_worker(WorkerId("w0"))
    assert "launcher" in made["runtime_env"]["py_executable"]
    maker.configure(ServeConfig(device="cpu", fork_workers=False))
    maker.start_worker(WorkerId("w1"))
    assert "runtime_env" not in made
