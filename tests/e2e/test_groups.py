"""Two groups of one worker each, as users see them: kill -9 of an engine and of a worker under streams."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from elastic_moe.deploy.backend.router import LOAD_S
from tests.e2e.conftest import READY_S, Reference, Server, kill_family, start
from tests.e2e.streams import PROMPT, Stream

TOKENS = 900
STREAMS = 4
"""So many that some run in each group."""

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def pair(checkpoint: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("groups") / "log"
    flags = ["--data-parallel-size", "2", "--workers", "1", "--dtype", "float32", "--max-model-len", "1024"]
    server = start([str(checkpoint), *flags, "--served-model-name", "tiny", "--no-standby"], log)
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


def kill_engine(server: Server) -> None:
    family = psutil.Process(server.process.pid).children(recursive=True)
    engines = [process for process in family if "ray::Engine" in " ".join(process.cmdline())]
    assert len(engines) == 2
    engines[0].kill()


def kill_worker(server: Server) -> None:
    """Of the second group. There is no other worker in it, and no standby."""
    (worker,) = [w for w in server.get("/admin/workers?engine=1") if w["state"] == "serving"]
    os.kill(worker["pid"], signal.SIGKILL)


def streams_in_both(server: Server) -> list[Stream]:
    """Streams that run in both groups. They may have ended before a call sees them there: then others are begun."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        streams = [Stream(server, TOKENS) for _ in range(STREAMS)]
        while any(stream.is_alive() for stream in streams):
            if all(running(server)):
                return streams
            time.sleep(0.02)
    raise AssertionError("no streams were seen in both groups")


@pytest.mark.parametrize("kill", [kill_engine, kill_worker])
def test_nothing_is_lost_with_a_group(pair: Server, reference: Reference, kill: Callable[[Server], None]) -> None:
    # the replica must not take the last test's requests, which have just ended, for those of others
    pair.wait("rest", lambda: running(pair) == [0, 0])
    time.sleep(2 * LOAD_S)
    streams = streams_in_both(pair)
    for stream in streams:
        stream.wait_for_pieces(5)
    kill(pair)
    expected = reference.text(reference.greedy(PROMPT, TOKENS))
    for stream in streams:
        stream.join(120)
        assert stream.finish_reason == "length"
        assert stream.text == expected
    pair.wait("both groups", lambda: all(ready(pair)))


def test_groups_are_scaled_and_counted_one_by_one(pair: Server) -> None:
    asked = pair.post("/admin/scale?engine=1", {"workers": 2})
    assert asked.status_code == 202, asked.text
    pair.wait("two workers", lambda: [e["workers"] for e in pair.get("/admin/engines")] == [1, 2])
    assert [len(pair.get(f"/admin/placement?engine={n}")["workers"]) for n in range(2)] == [1, 2]
    refused = pair.post("/admin/scale?engine=2", {"workers": 2})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "engine")
