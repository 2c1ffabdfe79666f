"""The small part of the laboratory that `make test` runs: names that lie, a silent partition, and its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import READY_S, Reference
from tests.hosts.cluster import HostCluster
from tests.hosts.lab import Lab
from tests.hosts.streams import begin, end

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def misnamed(lab: Lab) -> Iterator[None]:
    """Every host resolves its own name to 127.0.1.1."""
    for host in lab.hosts:
        lab.misname(host.number)
    yield
    for host in lab.hosts:
        lab.misname(host.number, undo=True)


@pytest.mark.usefixtures("misnamed")
def test_a_silent_partition_and_its_end(cluster: HostCluster, checkpoint: Path, reference: Reference) -> None:
    """Steps may take as long as they like: only what wakes a worker that waits lets the streams go on."""
    cluster.start_head()
    for number in (1, 2):
        cluster.join(number)
    server = cluster.serve(checkpoint, "--workers", "2", "--rebalance-interval", "0", "--step-timeout", "600")
    server.wait("readiness", server.ready, READY_S)
    places = {worker: cluster.host_of(server, worker) for worker in cluster.workers(server)}
    assert set(places.values()) == {1, 2}
    api_processes = [h.run("ps", "-e", "-o", "args").count("ServeReplica:") for h in cluster.lab.hosts]
    assert api_processes[1:] == [0, 0], "they would end with a worker's host, and their connections with them"
    lost, host = next(iter(places.items()))
    pid = cluster.pid_of(server, lost)

    streams = begin(server, 4, 200)
    cluster.lab.cut(host)
    end(streams, reference)
    assert list(cluster.workers(server)) == [worker for worker in places if worker != lost]

    cluster.lab.mend(host)
    server.wait("a new worker", lambda: len(cluster.workers(server)) == 2, 120)
    assert lost not in cluster.workers(server), "no second voice"
    server.wait("the end of the old worker's process", lambda: not cluster.lab.hosts[host].runs(pid))
    end(begin(server, 4, 40), reference)
