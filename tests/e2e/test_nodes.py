"""A Ray cluster of several nodes (raylets of one machine), joined with --address: death of a node, and a new one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from tests.e2e.conftest import MODEL, READY_S, Reference, Server, kill_family, start
from tests.e2e.streams import PROMPT, Stream

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    # Ray leaves sockets and subprocesses to the interpreter's end
    pytest.mark.filterwarnings("default::ResourceWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores, so that every worker is on a node of its own."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def members(server: Server) -> list[dict[str, Any]]:
    return list(server.get("/admin/placement")["workers"])


def joined(address: str, notice_s: float) -> subprocess.Popen[bytes]:
    """A node as it is started on a machine of its own. On SIGTERM it gives notice of so many seconds."""
    ray = Path(sys.executable).with_name("ray")
    environment = os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(notice_s)}
    command = [ray, "start", "--address", address, "--num-cpus", "1", "--block", "--disable-usage-stats"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def drain(address: str, node_id: str, seconds: float) -> None:
    """As a spot notice does, or `ray drain-node`."""
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    ends_ms = int(1000 * (time.time() + seconds))
    accepted, why = GcsClient(address=address).drain_node(node_id, reason, "the machine is taken away", ends_ms)
    assert accepted, why


def recoveries(server: Server) -> int:
    return sum(operation["kind"] == "recover" for operation in server.get("/admin/operations"))


def leave_with_notice(server: Server, cluster: Any, expected: str) -> None:
    """Two workers serve, each on a node. One node after the other is told to leave, and streams go on."""
    before = recoveries(server)
    leaving = str(members(server)[0]["node"])
    processes = [joined(cluster.address, notice_s=30)]
    tell: Callable[[], None] = lambda: drain(cluster.address, leaving, 30)  # noqa: E731
    try:
        for next_notice_s in (1, None):
            stay = {worker["node"] for worker in members(server)} - {leaving}
            watch(server, expected, tell, leaving)
            assert recoveries(server) == before
            server.wait("a worker in its place", lambda: len(members(server)) == 2, 90)
            (leaving,) = {worker["node"] for worker in members(server)} - stay
            tell = processes[-1].terminate
            if next_notice_s is not None:
                processes.append(joined(cluster.address, next_notice_s))
        # the last one ends before its worker has left
        watch(server, expected, tell, leaving)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def watch(server: Server, expected: str, tell: Callable[[], None], leaving: str) -> None:
    """Tell a node to leave while streams run: they end whole, and the workers are elsewhere."""
    streams = [Stream(server, 400) for _ in range(2)]
    for stream in streams:
        stream.wait_for_pieces(10)
    tell()
    since = time.monotonic()
    server.wait("its worker to leave", lambda: leaving not in {worker["node"] for worker in members(server)})
    for stream in streams:
        stream.join(120)
        assert stream.text == expected
    gaps = [b - a for stream in streams for a, b in pairwise(stream.stamps) if b > since]
    print(f"\na node leaves: the longest gap in a stream is {max(gaps):.2f} s")


def test_a_node_dies_and_another_comes(cluster: Any, checkpoint: Path, reference: Reference, tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    flags = ["--address", cluster.address, "--workers", "2", "--dtype", "float32", "--served-model-name", MODEL]
    flags += ["--max-model-len", "1024", "--rebalance-interval", "0", "--kv-cache-memory-bytes", "50000000"]
    server = start([str(checkpoint), *flags], tmp_path / "log")
    try:
        server.wait("readiness", server.ready, READY_S)
        places = {worker["id"]: worker["node"] for worker in members(server)}
        assert len(set(places.values())) == 2, "a worker on each node, so tokens travel by TCP"
        expected = reference.text(reference.greedy(PROMPT, 400))

        streams = [Stream(server, 400) for _ in places]
        for stream in streams:
            stream.wait_for_pieces(30)
        assert all(worker["running_requests"] for worker in server.get("/admin/workers")), "one stream at home on each"
        # whichever: the API's processes are on the head
        dead = nodes[0]
        cluster.remove_node(dead, allow_graceful=False)
        for stream in streams:
            stream.join(120)
            assert stream.text == expected
        assert [worker["id"] for worker in members(server)] == [w for w in places if places[w] != dead.node_id]

        cluster.add_node(num_cpus=1)
        server.wait("a worker on the new node", lambda: len(members(server)) == 2, 90)
        assert len({worker["node"] for worker in members(server)}) == 2
        stream = Stream(server, 100)
        stream.join(60)
        assert stream.text == reference.text(reference.greedy(PROMPT, 100))

        # what was joined goes on without us
        assert server.stop() == 0
    finally:
        kill_family(server)


@pytest.mark.hosts
def test_nodes_that_are_told_to_leave(cluster: Any, checkpoint: Path, reference: Reference, tmp_path: Path) -> None:
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    flags = ["--address", cluster.address, "--workers", "2", "--dtype", "float32", "--served-model-name", MODEL]
    flags += ["--max-model-len", "1024", "--rebalance-interval", "0", "--kv-cache-memory-bytes", "50000000"]
    server = start([str(checkpoint), *flags], tmp_path / "log")
    try:
        server.wait("readiness", server.ready, READY_S)
        leave_with_notice(server, cluster, reference.text(reference.greedy(PROMPT, 400)))
        assert server.stop() == 0
    finally:
        kill_family(server)
