"""A real server with too little memory for its model: the same tokens with fewer experts in memory, through scaling
and kill -9, down to one worker with memory for a quarter of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from tests.e2e.conftest import MODEL, READY_S, Reference, Server, kill_family, start
from tests.e2e.streams import GREEDY, PROMPT, Stream

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

WORKERS = 4
TOKENS = 120


@pytest.fixture(scope="module")
def small(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Four workers, of which each has memory for a quarter of the experts: two of each layer's eight."""
    directory = tmp_path_factory.mktemp("small")
    info = open_checkpoint(checkpoint).info.served_in("float32")
    memory_bytes = info.num_layers * info.num_logical_experts // WORKERS * info.expert_bytes
    flags = ["--workers", str(WORKERS), "--dtype", "float32", "--max-model-len", "1024", "--served-model-name", MODEL]
    flags += ["--expert-memory-bytes", str(memory_bytes), "--expert-cache-dir", str(directory / "experts")]
    server = start([str(checkpoint), *flags, "--rebalance-interval", "0", "--drain-timeout", "1"], directory / "log")
    try:
        server.wait("readiness", server.ready, READY_S)
        yield server
    finally:
        kill_family(server)


def resident(server: Server) -> float:
    return float(server.get("/ready")["resident"])


def answer(server: Server) -> str:
    whole = server.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=TOKENS, **GREEDY)
    return whole.choices[0].text


def scale(server: Server, workers: int) -> None:
    response = server.post("/admin/scale", {"workers": workers})
    assert response.status_code == 202, response.text
    operation = response.json()["operation_id"]
    server.wait(f"{workers} workers", lambda: server.get(f"/admin/operations/{operation}")["phase"] == "completed", 90)


def test_kill_9_of_three_workers_of_four(small: Server, reference: Reference) -> None:
    """The one that is left has memory for a quarter of the experts, and goes on with the stream at once."""
    expected = reference.text(reference.greedy(PROMPT, 400))
    assert resident(small) == 1.0
    stream = Stream(small, 400)
    stream.wait_for_pieces(20)
    left, *victims = [worker for worker in small.get("/admin/workers") if worker["state"] == "serving"]
    assert len(victims) == WORKERS - 1
    for worker in victims:
        os.kill(worker["pid"], signal.SIGKILL)
    small.wait("the survivor", lambda: [w["id"] for w in small.get("/admin/placement")["workers"]] == [left["id"]], 30)
    stream.join(120)
    assert stream.text == expected
    small.wait("everything in memory again", lambda: small.ready() and resident(small) == 1.0, 120)
    assert answer(small) == reference.text(reference.greedy(PROMPT, TOKENS))


def test_one_worker_serves_what_four_served(small: Server, reference: Reference) -> None:
    expected = reference.text(reference.greedy(PROMPT, TOKENS))
    stream = Stream(small, TOKENS)
    scale(small, 1)
    # of the two slots of each layer one is the cache area
    # the API asks the control plane for its readiness once a second
    small.wait("less memory", lambda: resident(small) == 1 / 8, 10)
    ready = small.get("/ready")
    assert (ready["ready"], ready["degraded"]) == (True, True)
    assert "degraded: 12% of the experts are in memory" in ready["reason"]
    stream.join(60)
    assert stream.text == expected
    assert answer(small) == expected
    tiers = small.get("/admin/placement")["tiers"]
    assert sorted(tiers[0]) == ["device", *["disk"] * 7]
    scale(small, 2)
    small.wait("more memory", lambda: resident(small) == 2 / 8)
    assert answer(small) == expected


def test_what_came_from_disk_is_counted(small: Server) -> None:
    def counted() -> dict[str, float]:
        text = httpx.get(f"{small.url}/metrics", timeout=30).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("emoe:expert")]
        return {name: float(value) for name, value in lines}

    def total(name: str, label: str) -> float:
        return sum(value for key, value in counted().items() if key.startswith(name) and label in key)

    small.wait("counts", lambda: total("emoe:expert_accesses_total", 'tier="disk"') > 0, 30)
    assert total("emoe:expert_accesses_total", 'tier="device"') > 0
    assert total("emoe:expert_fetch_bytes_total", "") > 0
    assert total("emoe:expert_stall_seconds_total", "") > 0
