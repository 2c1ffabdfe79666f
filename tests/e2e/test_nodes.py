"""A Ray cluster of several nodes (raylets of one machine), joined with --address: death of a node, and a new one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

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


def has_api_replica(node: Any) -> bool:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any("ServeReplica" in " ".join(process.cmdline()) for process in raylet.children())


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
        # a stream may end with the API replica that it goes through, so that one lives
        dead = next(node for node in nodes if not has_api_replica(node))
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
