"""The autoscaler on a real server: a queue brings a worker, idleness takes it away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import MODEL, READY_S, Reference, Server, kill_family, start
from tests.e2e.streams import PROMPT, Stream

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

METRICS = (
    "emoe:balancedness{",
    'emoe:rebalance_events_total{engine="0",model_name="tiny",result="completed"}',
    "emoe:rebalance_duration_seconds_bucket{",
    "emoe:experts_moved_total{",
    "emoe:bytes_moved_total{",
    'emoe:workers{engine="0",model_name="tiny",state="serving"}',
    'emoe:recoveries_total{cause="worker",engine="0",model_name="tiny"}',
    "emoe:recovery_duration_seconds_count{",
    "emoe:requests_resumed_total{",
)


def sizes(server: Server) -> int:
    return len(server.get("/admin/placement")["workers"])


def scalings(server: Server) -> list[dict[str, Any]]:
    return [op for op in server.get("/admin/operations") if op["kind"] == "scale"]


def metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return float(next(line for line in lines if line.startswith(name)).rsplit(" ", 1)[1])


def test_a_queue_brings_a_worker_and_idleness_takes_it(checkpoint: Path, reference: Reference, tmp_path: Path) -> None:
    flags = ["--workers", "1", "--min-workers", "1", "--max-workers", "2", "--max-num-seqs", "2"]
    flags += ["--autoscale-window", "2", "--drain-timeout", "1", "--rebalance-interval", "0", "--no-standby"]
    flags += ["--dtype", "float32", "--max-model-len", "1024", "--served-model-name", MODEL]
    server = start([str(checkpoint), *flags, "--kv-cache-memory-bytes", "50000000"], tmp_path / "log")
    try:
        server.wait("readiness", server.ready, READY_S)
        streams = [Stream(server, 600) for _ in range(8)]
        server.wait("another worker", lambda: sizes(server) == 2, 90)
        (up,) = scalings(server)
        assert "autoscale from 1 to 2 workers: demand" in up["reason"]
        steps = metric(server, "emoe:steps_total{")
        assert steps > 0
        for stream in streams:
            stream.join(120)
        expected = reference.text(reference.greedy(PROMPT, 600))
        assert {stream.text for stream in streams} == {expected}
        server.wait("a worker fewer", lambda: sizes(server) == 1, 60)
        down = scalings(server)[0]
        assert "1 worker would have a demand of 0%" in down["reason"]
        server.wait("its end", lambda: scalings(server)[0]["safe_to_terminate"], 10)
        text = httpx.get(f"{server.url}/metrics", timeout=30).text
        assert [name for name in METRICS if name not in text] == []
        # a new worker reads its experts, one that leaves gives them away
        assert metric(server, "emoe:experts_moved_total{") > 0
        # totals are of all times, whoever serves now
        assert metric(server, "emoe:steps_total{") >= steps
        assert server.stop() == 0
    finally:
        kill_family(server)
