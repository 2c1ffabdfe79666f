"""What becomes of requests when hosts, links and Ray's own processes fail: `make hosts`.

Each case prints how long no stream got a token. The tokens are transformers' on one machine, in every case.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import MODEL, READY_S, Reference, Server
from tests.hosts.cluster import HostCluster
from tests.hosts.streams import PROMPTS, HostStream, Streaming, begin, end

pytestmark = [pytest.mark.ray, pytest.mark.hosts, pytest.mark.timeout(1200)]

STREAMS = 6
TOKENS = 400


@pytest.fixture
def served(cluster: HostCluster, checkpoint: Path) -> Iterator[tuple[HostCluster, Server]]:
    """Three hosts: a head without cores, and two with a worker each."""
    cluster.start_head()
    for number in (1, 2):
        cluster.join(number)
    server = cluster.serve(checkpoint, "--workers", "2", "--rebalance-interval", "0")
    server.wait("readiness", server.ready, READY_S)
    yield cluster, server
    print(server.log.read_text()[-3000:])


def victim(cluster: HostCluster, server: Server) -> int:
    """A host with a worker. The API's processes are on the head."""
    return cluster.host_of(server, next(iter(cluster.workers(server))))


def outage_s(streams: list[HostStream], since: float) -> float:
    return max(stream.longest_gap_s(since) for stream in streams)


def under_load(
    served: tuple[HostCluster, Server], reference: Reference, name: str, fault: Callable[[int], object]
) -> float:
    """Let the fault happen to a host while streams run, which must end as on one machine. Returns the outage."""
    cluster, server = served
    host = victim(cluster, server)
    streams = begin(server, STREAMS, TOKENS)
    since = time.monotonic()
    fault(host)
    end(streams, reference)
    found = outage_s(streams, since)
    print(f"\n{name:32} outage {found:5.2f} s")
    return found


def whole_again(cluster: HostCluster, server: Server, workers: int = 2) -> None:
    server.wait("a whole cluster", lambda: len(cluster.workers(server)) == workers, 180)


def test_kill_of_a_host(served: tuple[HostCluster, Server], reference: Reference) -> None:
    cluster, server = served
    killed: list[int] = []

    def kill(host: int) -> None:
        killed.append(host)
        cluster.lab.kill_host(host)

    assert under_load(served, reference, "kill -9 of a host", kill) < 4
    cluster.lab.revive(killed[0])
    cluster.join(killed[0])
    whole_again(cluster, server)
    # a host that loses its power says nothing
    silent = under_load(served, reference, "loss of power", lambda n: cluster.lab.kill_host(n, silently=True))
    assert silent < 8


def test_partitions(served: tuple[HostCluster, Server], reference: Reference) -> None:
    cluster, server = served
    cut: list[int] = []

    def sever(host: int) -> None:
        cut.append(host)
        cluster.lab.cut(host)

    assert under_load(served, reference, "partition", sever) < 8
    cluster.lab.mend(cut[0])
    whole_again(cluster, server)
    # and one that is over before anybody is given up
    blink = under_load(served, reference, "partition of 1 s", lambda n: (sever(n), time.sleep(1), cluster.lab.mend(n)))
    assert blink < 8
    whole_again(cluster, server)
    end(begin(server, STREAMS, 60), reference)


def test_a_lost_gcs_ends_streams_with_an_error(cluster: HostCluster, checkpoint: Path) -> None:
    """It keeps everything in memory, so nothing can go on for long."""
    cluster.env["RAY_gcs_rpc_server_reconnect_timeout_s"] = "25"
    cluster.start_head(block=False)
    for number in (1, 2):
        cluster.join(number)
    server = cluster.serve(checkpoint, "--workers", "2", "--rebalance-interval", "0")
    server.wait("readiness", server.ready, READY_S)
    # so that streams last
    cluster.lab.limit(1, 1)
    try:
        streams = begin(server, STREAMS, 900)
        cluster.process(0, "gcs_server").kill()
        for stream in streams:
            stream.join(60)
            assert stream.finish_reason is None, "it was over before"
            assert "Ray's GCS" in (stream.error or "it was cut off")
        server.wait("the server to say so", lambda: "Ray's GCS at" in server.log.read_text())
    finally:
        cluster.lab.limit(1, None)


def keep_gcs(cluster: HostCluster) -> None:
    """On a disk that outlives the head."""
    storage = cluster.logs / "gcs-storage"
    storage.mkdir()
    cluster.env |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(storage)}


def test_a_head_with_storage_may_be_lost(cluster: HostCluster, checkpoint: Path, reference: Reference) -> None:
    """Engine, coordinator and proxy come back on the next head, and what was accepted in the background goes on."""
    keep_gcs(cluster)
    cluster.env["RAY_gcs_rpc_server_reconnect_timeout_s"] = "300"
    cluster.start_head()
    for number in (1, 2):
        cluster.join(number)
    server = cluster.serve(checkpoint, "--workers", "2", "--rebalance-interval", "0")
    server.wait("readiness", server.ready, READY_S)
    cluster.lab.limit(1, 1)
    try:
        chat, tokens = "Where is the expert?", 300
        body = {"model": MODEL, "input": chat, "max_output_tokens": tokens, "temperature": 0, "ignore_eos": True}
        accepted = server.post("/v1/responses", {**body, "background": True}).json()
        time.sleep(1)
        assert server.get(f"/v1/responses/{accepted['id']}")["status"] == "in_progress"
        since = time.monotonic()
        cluster.lab.kill_host(0)
        cluster.lab.revive(0)
        cluster.start_head()
    finally:
        cluster.lab.limit(1, None)

    def ended() -> dict[str, Any]:
        try:
            found: dict[str, Any] = server.get(f"/v1/responses/{accepted['id']}")
        except (httpx.HTTPError, ValueError):
            return {}
        return found if found["status"] not in ("queued", "in_progress") else {}

    server.wait("the background response", ended, 240)
    print(f"\n{'loss of the head':32} background response whole after {time.monotonic() - since:5.1f} s")
    text = "".join(part["text"] for item in ended()["output"] for part in item["content"])
    assert text == reference.text(reference.greedy(reference.chat(chat), tokens))
    end(begin(server, STREAMS, 60), reference)


def test_a_gcs_with_storage_may_be_restarted(cluster: HostCluster, checkpoint: Path, reference: Reference) -> None:
    keep_gcs(cluster)
    cluster.start_head(block=False)
    for number in (1, 2):
        cluster.join(number)
    server = cluster.serve(checkpoint, "--workers", "2", "--rebalance-interval", "0")
    server.wait("readiness", server.ready, READY_S)
    streams = begin(server, STREAMS, TOKENS)
    since = time.monotonic()
    cluster.restart_gcs(5.0)
    end(streams, reference)
    print(f"\n{'restart of the GCS':32} outage {outage_s(streams, since):5.2f} s")
    assert outage_s(streams, since) < 1
    # and what needs the GCS works again
    host = victim(cluster, server)
    cluster.lab.kill_host(host)
    cluster.lab.revive(host)
    cluster.join(host)
    whole_again(cluster, server)
    end(begin(server, STREAMS, 60), reference)


ROUNDS = 5
FAULTS = ("kill", "power", "cut", "blink", "slow", "raylet")


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_random_faults(served: tuple[HostCluster, Server], reference: Reference, seed: int) -> None:
    """20 rounds in all: something happens to a host with a worker while six streams run; then the cluster is whole
    again."""
    cluster, server = served
    rng = random.Random(seed)
    lab = cluster.lab
    for turn in range(ROUNDS):
        kind = rng.choice(FAULTS)
        host = victim(cluster, server)
        streams = begin(server, STREAMS, TOKENS // 2)
        time.sleep(rng.uniform(0, 0.5))
        since = time.monotonic()
        if kind in ("kill", "power"):
            lab.kill_host(host, silently=kind == "power")
        elif kind in ("cut", "blink"):
            lab.cut(host)
            if kind == "blink":
                time.sleep(rng.uniform(0.2, 4.0))
                lab.mend(host)
        elif kind == "slow":
            lab.limit(host, rng.choice([1, 5, 20]))
        else:
            cluster.kill_raylet(host)
        end(streams, reference)
        print(f"round {turn:2} {kind:7} on host {host}: outage {outage_s(streams, since):5.2f} s", flush=True)
        lab.limit(host, None)
        if kind in ("kill", "power"):
            lab.revive(host)
            cluster.join(host)
        elif kind == "cut":
            lab.mend(host)
        elif kind == "raylet":
            cluster.join(host)
        whole_again(cluster, server)


def test_workers_move_to_a_machine_that_joins_late(
    cluster: HostCluster, checkpoint: Path, reference: Reference
) -> None:
    """As after `ray up`, which returns before the machines join: both workers begin on the first one."""
    cluster.start_head()
    cluster.join(1, cpus=2)
    server = cluster.serve(checkpoint, "--workers", "2", "--rebalance-interval", "0")
    server.wait("readiness", server.ready, READY_S)
    assert len(set(cluster.workers(server).values())) == 1
    streaming = Streaming(server, PROMPTS[0], TOKENS)
    cluster.join(2, cpus=2)
    server.wait("a worker on each", lambda: len(set(cluster.workers(server).values())) == 2, 120)
    gap_s = streaming.end()
    print(f"\n{'workers move to a later host':32} longest gap in {len(streaming.streams)} streams {gap_s:5.2f} s")
    assert streaming.streams[0].text == reference.text(reference.greedy(PROMPTS[0], TOKENS))
    assert len(cluster.workers(server)) == 2
    assert gap_s < 2
