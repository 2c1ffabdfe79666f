"""`emoe scale`: what it asks of a server, and what it says of the answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from elastic_moe.deploy.cli.main import main

ENGINES = [
    {"engine": 0, "ready": True, "retiring": False, "workers": 2, "running": 3},
    {"engine": 1, "ready": True, "retiring": True, "workers": 2, "running": 0},
    {"engine": 2, "ready": False, "reason": "starting", "retiring": False, "workers": None, "running": None},
    {"engine": 3, "ready": True, "retiring": False, "workers": 1, "running": 1},
]


class Server(BaseHTTPRequestHandler):
    asked: ClassVar[list[tuple[str, str | None, Any]]] = []

    told: ClassVar[list[dict[str, Any]]] = []
    """What is said of the operation, question by question."""

    def do_GET(self) -> None:
        if self.path == "/admin/engines":
            self._answer(200, ENGINES)
        else:
            self.asked.append((self.path, self.headers["Authorization"], None))
            self._answer(200, {"operation_id": "scale-7", "error": None, "progress": 0.0, **self.told.pop(0)})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Authorization"], body))
        if body.get("workers") == 9:
            self._answer(400, {"error": {"message": "workers: expected 1 to 4, got 9"}})
        elif self.path == "/admin/engines":
            self._answer(202, {"data_parallel_size": 2, "data_parallel_size_before": 1})
        else:
            self._answer(202, {"operation_id": "scale-7", "reason": "w2 to leave"})

    def _answer(self, status: int, body: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Server.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_groups_and_workers_are_changed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--url", url]) == 0
    listed = (
        "group 0: ready, 2 workers, 3 running requests\ngroup 1: retiring, 2 workers, 0 running requests\n"
        "group 2: not ready: starting\ngroup 3: ready, 1 worker, 1 running request\n"
    )
    assert capsys.readouterr().out == listed
    assert main(["scale", "--url", url, "--data-parallel-size", "2", "--api-key", "k"]) == 0
    assert capsys.readouterr().out == "from 1 to 2 groups\n" + listed
    assert main(["scale", "--url", url, "--retire", "w2", "--retire", "w3", "--engine", "1"]) == 0
    follow = f"how far it is: curl '{url}/admin/operations/scale-7?engine=1'; --wait waits for its end\n"
    assert capsys.readouterr().out == "operation scale-7: w2 to leave\n" + follow + listed.splitlines(True)[1]
    assert Server.asked == [
        ("/admin/engines", "Bearer k", {"data_parallel_size": 2}),
        ("/admin/scale?engine=1", None, {"retire": ["w2", "w3"]}),
    ]


def test_an_operation_is_waited_for(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_moe.deploy.calls.scale.LOOK_S", 0.01)
    begun = {"phase": "preparing", "progress": 0.5}
    Server.told[:] = [begun, begun, {**begun, "error": "a copy failed"}, {"phase": "completed", "reason": "2 workers"}]
    assert main(["scale", "--url", url, "--workers", "2", "--wait", "--api-key", "k"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "operation scale-7: w2 to leave",
        "preparing, 50%",
        "preparing, 50% (it is tried again: a copy failed)",
        "completed: 2 workers",
    ]
    assert Server.asked[-1] == ("/admin/operations/scale-7?engine=0", "Bearer k", None)
    Server.told[:] = [begun, {"phase": "failed", "error": "replaced by another request"}]
    assert main(["scale", "--url", url, "--workers", "2", "--wait"]) == 2
    assert "operation scale-7 has failed: replaced by another request" in capsys.readouterr().err


def test_one_group_is_listed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--url", url, "--engine", "1"]) == 0
    assert capsys.readouterr().out == "group 1: retiring, 2 workers, 0 running requests\n"


def test_mistakes_are_told(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--url", url, "--workers", "9"], "workers: expected 1 to 4, got 9"),
        (["--url", url, "--workers", "2", "--data-parallel-size", "2"], "--data-parallel-size: cannot be given"),
        (["--url", url, "--engine", "7"], "--engine: expected 0 to 3, got 7"),
        (["--url", url, "--engine", "-1"], "--engine: expected 0 to 4095, got '-1'"),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9/admin/engines: "),
        (
            ["--url", "nowhere"],
            "--url: expected http://HOST:PORT or https://HOST:PORT, got 'nowhere'; http://nowhere has",
        ),
        (["--url", "localhost:8000"], "; http://localhost:8000 has the scheme"),
        (["--url", "htp://x"], "got 'htp://x'"),
        (["--url", "http://[::1"], "got 'http://[::1'"),
        (["--url", "http://x:port"], "got 'http://x:port'"),
        (["--url", "http://"], "got 'http://'"),
        (["--url", url, "--wait"], "--wait: needs --workers or --retire"),
        (["--url", url, "--wait", "--data-parallel-size", "2"], "--wait: needs"),
    ):
        assert main(["scale", *arguments]) == 2
        assert words in capsys.readouterr().err
