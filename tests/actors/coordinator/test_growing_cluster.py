"""On a Ray to which real raylets come and which they leave: by its autoscaler, with GPUs, and late, with cores."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from elastic_moe.actors.coordinator.start import start_cluster, stop_cluster
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.redeploy import Generation
from tests.actors.coordinator.test_start import ask, serving, wait_ready, wait_until
from tests.actors.fakes import FakeEngine, FakeRayFleet
from tests.growing_ray import GrowingRay, growing_ray

pytestmark = [
    pytest.mark.ray,
    pytest.mark.hosts,
    pytest.mark.timeout(300),
    # Ray leaves sockets and subprocesses to the interpreter's end
    pytest.mark.filterwarnings("default::ResourceWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without cores, as `ray up` leaves it: the workers' machines have yet to join."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrowingRay]:
    """A head that has cores and no GPU, and room for two nodes with a GPU each, of which none is there yet."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    gpu = {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": 80 << 20}, "max_workers": 2}
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-", ignore_cleanup_errors=True) as directory,
        growing_ray(Path(directory), {"CPU": 2}, {"gpu": gpu}, idle_s=3) as growing,
    ):
        ray.init(address=growing.address, log_to_driver=False, logging_level=logging.ERROR)
        yield growing
        ray.shutdown()


def gpu_nodes() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]


def drain(node: str, seconds: float) -> None:
    """As a spot notice does, or `ray drain-node`."""
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why = client.drain_node(node, reason, "the machine is taken away", int(1000 * (time.time() + seconds)))
    assert accepted, why


def test_gpu_nodes_come_and_go(joined: GrowingRay, tmp_path: Path) -> None:
    config = ServeConfig(workers=1, device="cuda", rebalance_interval=0, drain_timeout=1)
    with joined.held():
        coordinator = start_cluster(config, str(tmp_path), FakeRayFleet(config, Generation("grows"), alone=False))
        wait_until(lambda: "w0 waits for a GPU: the cluster has none" in ask(coordinator, "readiness").reason)
        assert not gpu_nodes()
    wait_ready(coordinator)
    (first,) = gpu_nodes()
    assert [(worker.id, worker.node) for worker in serving(coordinator)] == [("w0", first)]

    # the node is told to leave, and serves until Ray has brought another one
    drain(first, 60)
    wait_until(lambda: [worker.id for worker in serving(coordinator)] == ["w1"], 90)
    assert not any(operation.kind == "recover" for operation in ask(coordinator, "operations"))
    (worker,) = serving(coordinator)
    assert worker.node != first
    # a node that drains ends once it is idle
    wait_until(lambda: gpu_nodes() == [worker.node])

    # nobody needs a node any more
    stop_cluster(10)
    wait_until(lambda: not gpu_nodes(), 60)


def test_load_brings_nodes_and_rest_gives_them_back(joined: GrowingRay, tmp_path: Path) -> None:
    config = ServeConfig(
        workers=1,
        min_workers=0,
        max_workers=2,
        autoscale_window=1.0,
        device="cuda",
        rebalance_interval=0,
        drain_timeout=1,
    )
    fleet = FakeRayFleet(config, Generation("loaded"), alone=False)
    waiting, fleet._engine_class = tmp_path / "waiting", type("Loaded", (FakeEngine,), {"model_dir": tmp_path})
    coordinator = start_cluster(config, str(tmp_path), fleet)
    wait_ready(coordinator)
    assert len(gpu_nodes()) == 1

    waiting.write_text("100")
    wait_until(lambda: len(serving(coordinator)) == 2)
    assert {worker.node for worker in serving(coordinator)} == set(gpu_nodes())

    waiting.unlink()
    wait_until(lambda: len(serving(coordinator)) == 1)
    wait_until(lambda: not serving(coordinator))
    assert "at rest" in ask(coordinator, "readiness").reason
    wait_until(lambda: not gpu_nodes())

    waiting.write_text("1")
    wait_until(lambda: len(serving(coordinator)) == 1)
    assert [worker.node for worker in serving(coordinator)] == gpu_nodes()
    stop_cluster(10)


def test_workers_of_an_early_deploy_spread_over_the_machines_as_they_come(early: Cluster, tmp_path: Path) -> None:
    config = ServeConfig(workers=3, device="cpu", rebalance_interval=0, drain_timeout=1)
    coordinator = start_cluster(config, str(tmp_path), FakeRayFleet(config, Generation("early"), alone=False))

    def homes() -> list[str]:
        return sorted(worker.node for worker in serving(coordinator))

    first = early.add_node(num_cpus=4, object_store_memory=80 << 20).node_id
    wait_ready(coordinator)
    wait_until(lambda: homes() == [first] * 3)

    others = [early.add_node(num_cpus=4, object_store_memory=80 << 20).node_id for _ in range(2)]
    wait_until(lambda: homes() == sorted([first, *others]))
    assert [worker.id for worker in serving(coordinator)] == ["w0", "w3", "w4"]
    assert not any(operation.kind == "recover" for operation in ask(coordinator, "operations"))
    stop_cluster(10)
