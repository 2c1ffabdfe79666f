"""On a Ray whose autoscaler adds and removes real raylets: workers that wait for GPU nodes, and nodes that leave."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from elastic_moe.actors.control.start import start_cluster, stop_cluster
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.redeploy import Generation
from tests.actors.control.test_start import ask, serving, wait_ready, wait_until
from tests.actors.fakes import FakeRayFleet
from tests.growing_ray import growing_ray

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(180),
    # Ray leaves sockets and subprocesses to the interpreter's end
    pytest.mark.filterwarnings("default::ResourceWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A head that has cores and no GPU, and room for two nodes with a GPU each, of which none is there yet."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    gpu = {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": 80 << 20}, "max_workers": 2}
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-", ignore_cleanup_errors=True) as directory,
        growing_ray(Path(directory), {"CPU": 2}, {"gpu": gpu}, idle_s=3) as address,
    ):
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        yield
        ray.shutdown()


def gpu_nodes() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]


def test_gpu_nodes_that_have_yet_to_come(joined: None, tmp_path: Path) -> None:
    config = ServeConfig(workers=2, device="cuda", rebalance_interval=0, drain_timeout=1)
    coordinator = start_cluster(config, str(tmp_path), FakeRayFleet(config, Generation("grows"), alone=False))
    assert not gpu_nodes()
    reasons: set[str] = set()

    def waits() -> bool:
        reasons.add(ask(coordinator, "readiness").reason)
        return any("wait for a GPU: the cluster has none" in reason for reason in reasons)

    wait_until(waits)
    wait_ready(coordinator)
    assert {worker.node for worker in serving(coordinator)} == set(gpu_nodes())

    # a worker fewer: its node is idle, and Ray takes it away
    operation: Any = ask(coordinator, "scale", 1)
    wait_until(lambda: ask(coordinator, "operation", operation.operation_id).safe_to_terminate)
    wait_until(lambda: len(gpu_nodes()) == 1, 90)
    wait_ready(coordinator)
    assert [worker.node for worker in serving(coordinator)] == gpu_nodes()
    stop_cluster(10)
