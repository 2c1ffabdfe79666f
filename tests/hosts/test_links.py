"""One slow link among three hosts: it is found when the group forms, and the plan moves traffic off it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.e2e.conftest import READY_S, Reference, Server
from tests.hosts.cluster import HostCluster
from tests.hosts.streams import begin, end

pytestmark = [pytest.mark.ray, pytest.mark.hosts, pytest.mark.timeout(1200)]

SLOW = 2
MBIT = 4.0
STREAMS, TOKENS = 6, 100


def carried(cluster: HostCluster) -> int:
    """Bytes that the slow host has sent and received so far."""
    statistics = Path("/sys/class/net") / cluster.lab.hosts[SLOW].port / "statistics"
    return sum(int((statistics / name).read_text()) for name in ("rx_bytes", "tx_bytes"))


def load(cluster: HostCluster, server: Server, reference: Reference) -> tuple[float, float]:
    """Run streams to their ends. Returns (tokens per second, bytes over the slow link per token)."""
    before, since = carried(cluster), time.monotonic()
    end(begin(server, STREAMS, TOKENS), reference)
    tokens = STREAMS * TOKENS
    return tokens / (time.monotonic() - since), (carried(cluster) - before) / tokens


def test_the_plan_moves_traffic_off_a_slow_link(cluster: HostCluster, checkpoint: Path, reference: Reference) -> None:
    cluster.start_head(cpus=1)
    for number in (1, SLOW):
        cluster.join(number)
    cluster.lab.limit(SLOW, MBIT)
    try:
        flags = [
            "--workers",
            "3",
            "--redundant-experts",
            "7",
            "--rebalance-interval",
            "0",
            "--step-timeout",
            "600",
            "--workers-on-head",
        ]
        server = cluster.serve(checkpoint, *flags)
        server.wait("readiness", server.ready, READY_S)
        slow = next(w for w in cluster.workers(server) if cluster.host_of(server, w) == SLOW)
        server.wait("the rates", lambda: all(w["link_gbps"] for w in server.get("/admin/workers")), 30)
        rates = {w["id"]: w["link_gbps"] for w in server.get("/admin/workers")}
        print(f"\nGb/s: {rates}")
        fast = {peer: rate for one, row in rates.items() if one != slow for peer, rate in row.items() if peer != slow}
        assert max(rates[slow].values()) < 0.1 < min(fast.values())

        before = load(cluster, server, reference)
        server.wait("counts", lambda: server.get("/admin/routing")["tokens"] > 0, 60)
        print(cluster.rebalance(server, "local_search", 60))
        after = load(cluster, server, reference)
        print(f"before {before[0]:.1f} tokens/s, {before[1]:.0f} bytes per token over the slow link")
        print(f"after  {after[0]:.1f} tokens/s, {after[1]:.0f} bytes per token over the slow link")
        assert after[1] < before[1]
    finally:
        cluster.lab.limit(SLOW, None)
