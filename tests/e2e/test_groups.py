"""Two groups of one worker each, as users see them: kill -9 of an engine and of a worker under streams."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from elastic_moe.deploy.backend.router import LOAD_S
from tests.e2e.conftest import PLAIN, READY_S, Reference, Server, kill_family, start
from tests.e2e.streams import PROMPT, Stream

TOKENS = 2000
STREAMS = 4
"""They begin together, so half of them run in each group."""
TRIES = 5
COUNTED_S = 10.0
"""By then a replica has told that a request went on."""
INTERVAL = 20
"""Tokens of an event. With one event for each token, the threads that read here kept one another from Python's lock:
first tokens that the server had sent within 0.04 s were read after 5 s, when the answers had ended there."""

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def pair(checkpoint: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("groups") / "log"
    flags = ["--data-parallel-size", "2", "--workers", "1", "--dtype", "float32", "--max-model-len", "2048"]
    flags += ["--stream-interval", str(INTERVAL), "--served-model-name", "tiny", "--no-standby"]
    server = start([str(checkpoint), *flags], log)
    try:
        server.wait("readiness", server.ready, READY_S)
        server.wait("both groups", lambda: all(ready(server)))
        yield server
    finally:
        kill_family(server)


def ready(server: Server) -> list[bool]:
    return [engine["ready"] for engine in server.get("/admin/engines")]


def running(server: Server) -> list[int]:
    return [engine["running"] or 0 for engine in server.get("/admin/engines")]


def counts(server: Server, metric: str) -> list[float]:
    """The metric's value for each group that has one."""
    text = httpx.get(f"{server.url}/metrics", timeout=30, verify=PLAIN).text
    rows = [re.match(rf'{metric}{{.*engine="(\d)".*}} (.*)', line) for line in text.splitlines()]
    return [float(value) for _, value in sorted(row.groups() for row in rows if row is not None)]


def an_engine(server: Server) -> int:
    family = psutil.Process(server.process.pid).children(recursive=True)
    engines = [process.pid for process in family if "ray::Engine" in " ".join(process.cmdline())]
    assert len(engines) == 2
    return engines[0]


def the_worker(server: Server) -> int:
    """Of the second group. There is no other worker in it, and no standby."""
    (worker,) = [w for w in server.get("/admin/workers?engine=1") if w["state"] == "serving"]
    return int(worker["pid"])


@pytest.mark.parametrize("victim", [an_engine, the_worker])
def test_nothing_is_lost_with_a_group(pair: Server, reference: Reference, victim: Callable[[Server], int]) -> None:
    expected = reference.text(reference.greedy(PROMPT, TOKENS))
    # on a busy machine the kill may come when the victim's streams have ended
    assert any(went_on(pair, victim, expected) for _ in range(TRIES)), "no kill came in time"


def went_on(pair: Server, victim: Callable[[Server], int], expected: str) -> bool:
    """Kill the victim under streams, none of which may be lost. Returns whether some went on in another group."""
    # the replica must not take the last streams, which have just ended, for those of others
    pair.wait("rest", lambda: running(pair) == [0, 0])
    time.sleep(2 * LOAD_S)
    process, begun = victim(pair), counts(pair, "vllm:prompt_tokens_total")
    (moved,) = counts(pair, "emoe:requests_resumed_total")
    streams = [Stream(pair, TOKENS) for _ in range(STREAMS)]
    for stream in streams:
        stream.wait_for_pieces(3)
    os.kill(process, signal.SIGKILL)
    for stream in streams:
        stream.join(120)
        assert stream.finish_reason == "length"
        assert stream.text == expected
    # counters remember what a look at the streams that run may come too late for
    new = [after - before for before, after in zip(begun, counts(pair, "vllm:prompt_tokens_total"), strict=True)]
    assert new == [len(PROMPT) * STREAMS / 2] * 2, "half of them began in each group"
    pair.wait("both groups", lambda: all(ready(pair)))
    deadline = time.monotonic() + COUNTED_S
    while counts(pair, "emoe:requests_resumed_total") == [moved]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_groups_are_scaled_and_counted_one_by_one(pair: Server) -> None:
    asked = pair.post("/admin/scale?engine=1", {"workers": 2})
    assert asked.status_code == 202, asked.text
    pair.wait("two workers", lambda: [e["workers"] for e in pair.get("/admin/engines")] == [1, 2])
    assert [len(pair.get(f"/admin/placement?engine={n}")["workers"]) for n in range(2)] == [1, 2]
    refused = pair.post("/admin/scale?engine=2", {"workers": 2})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "engine")
