"""The control plane on a real Ray, with workers and an engine that pretend: deaths are kill -9."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private.ray_constants import KV_NAMESPACE_FUNCTION_TABLE

from elastic_moe.actors.coordinator.start import start_cluster, stop_cluster
from elastic_moe.actors.remote import generations
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.messages.views import Operation, Phase, Readiness, WorkerView
from tests.actors.fakes import FakeRayFleet

pytestmark = [
    pytest.mark.ray,
    # Ray leaves sockets and subprocesses to the interpreter's end
    pytest.mark.filterwarnings("default::ResourceWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", include_dashboard=False, num_cpus=4, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def coordinator(local_ray: None, tmp_path: Path) -> Iterator[Any]:
    config = ServeConfig(workers=2, rebalance_interval=0, step_timeout=5)
    yield start_cluster(config, str(tmp_path), FakeRayFleet(config))
    pids = [worker.pid for worker in ask_all_workers()]
    stop_cluster(10)
    stop_cluster(10)  # harmless
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    left = ray.util.list_named_actors(all_namespaces=True)
    assert not [actor for actor in left if actor["namespace"].startswith("emoe")]


def ask_all_workers() -> list[WorkerView]:
    (coordinator,) = generations.coordinators().values()
    return ask(coordinator, "workers")


def ask(coordinator: Any, method: str, *arguments: Any) -> Any:
    return ray.get(getattr(coordinator.handle, method).remote(*arguments), timeout=30)


def wait_until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def wait_ready(coordinator: Any) -> None:
    def ready() -> bool:
        readiness: Readiness = ask(coordinator, "readiness")
        assert readiness.error is None, readiness
        return readiness.ready

    wait_until(ready)


def serving(coordinator: Any) -> list[WorkerView]:
    return [worker for worker in ask(coordinator, "workers") if worker.state == "serving"]


@pytest.mark.parametrize("slow", ["export_experts", "prepare"])
def test_kill_9_while_a_placement_changes(coordinator: Any, tmp_path: Path, slow: str) -> None:
    config = ServeConfig()
    found = start_cluster(config, "elsewhere", FakeRayFleet(config))
    assert pid_of(found) == pid_of(coordinator), "there is one already, and it is found"
    wait_ready(coordinator)
    wait_until(lambda: ask(coordinator, "routing").tokens)
    (tmp_path / f"slow-{slow}").touch()
    operation: Operation = ask(coordinator, "rebalance", "greedy")
    stage = "transferring" if slow == "export_experts" else "preparing"
    time.sleep(0.7)
    assert ask(coordinator, "operation", operation.operation_id).phase is Phase.PREPARING, stage
    victim = serving(coordinator)[0]
    killed_at = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    (tmp_path / f"slow-{slow}").unlink()
    # it may serve again before anybody sees that it does not
    wait_until(lambda: victim.id not in {worker.id for worker in serving(coordinator)}, 5)
    wait_ready(coordinator)
    assert time.monotonic() - killed_at < 10
    wait_until(lambda: len(serving(coordinator)) == 2)
    assert victim.id not in {worker.id for worker in serving(coordinator)}
    # it was asked for, so its planner is asked again, for the workers that there are now
    wait_until(lambda: ask(coordinator, "operation", operation.operation_id).phase is Phase.COMPLETED)


def test_kill_9_of_all_workers(coordinator: Any) -> None:
    wait_ready(coordinator)
    for worker in serving(coordinator):
        os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: not ask(coordinator, "readiness").ready)
    wait_ready(coordinator)
    assert [worker.id for worker in serving(coordinator)] == ["w2", "w3"]


def test_further_workers_export_no_further_class(coordinator: Any) -> None:
    """Each process that is told of a worker keeps its class, and Ray does."""
    wait_ready(coordinator)
    exported = classes_in_gcs()
    for worker in serving(coordinator):
        os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: not ask(coordinator, "readiness").ready)
    wait_ready(coordinator)
    assert classes_in_gcs() == exported


def classes_in_gcs() -> set[bytes]:
    keys = ray._private.worker.global_worker.gcs_client.internal_kv_keys(b"ActorClass", KV_NAMESPACE_FUNCTION_TABLE)
    assert keys
    return set(keys)


def test_kill_9_of_the_coordinator_disturbs_no_request(coordinator: Any) -> None:
    wait_ready(coordinator)
    before = serving(coordinator)
    os.kill(pid_of(coordinator), signal.SIGKILL)
    wait_ready(coordinator)
    assert ask(coordinator, "placement").epoch == 1
    assert [worker.pid for worker in serving(coordinator)] == [worker.pid for worker in before]
    # and it still watches over them
    os.kill(before[0].pid, signal.SIGKILL)
    wait_until(lambda: [worker.id for worker in serving(coordinator)] == ["w1", "w2"])


def test_kill_9_of_coordinator_and_worker_together(coordinator: Any) -> None:
    wait_ready(coordinator)
    victim = serving(coordinator)[0]
    os.kill(pid_of(coordinator), signal.SIGKILL)
    os.kill(victim.pid, signal.SIGKILL)
    wait_until(lambda: [worker.id for worker in serving(coordinator)] == ["w1", "w2"])
    wait_ready(coordinator)


def pid_of(actor: Any) -> int:
    return int(ray._private.state.actors(actor.handle._actor_id.hex())["Pid"])
