"""`emoe scale`: what it asks of a server, and what it says of the answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from elastic_moe.deploy.calls.requests import server_url
from elastic_moe.deploy.cli.main import main

ENGINES = [
    {"engine": 0, "ready": True, "retiring": False, "workers": 2, "target": 4, "running": 3},
    {"engine": 1, "ready": True, "retiring": True, "workers": 2, "target": 2, "running": 0},
    {
        "engine": 2, "ready": False, "reason": "starting, 1 of 2 workers ready", "retiring": False, "workers": 0,
        "target": 2, "running": 0,
    },
    {"engine": 3, "ready": True, "retiring": False, "workers": 1, "target": 1, "running": 1},
]  # fmt: skip


def group(number: int, *, ready: bool = True, retiring: bool = False, error: str | None = None) -> dict[str, Any]:
    reason = "serving" if ready else "starting"
    return ENGINES[3] | {"engine": number, "ready": ready, "retiring": retiring, "error": error, "reason": reason}


class Server(BaseHTTPRequestHandler):
    asked: ClassVar[list[tuple[str, str | None, Any]]] = []

    told: ClassVar[list[dict[str, Any]]] = []
    """What is said of the operation, question by question."""

    groups: ClassVar[list[list[dict[str, Any]]]] = []
    """What is said of the groups, question by question; the last answer stays. ENGINES if it is empty."""
    before: ClassVar[int] = 1
    """Number of groups before the change."""

    def do_GET(self) -> None:
        if self.path == "/admin/engines":
            groups = self.groups
            self._answer(200, ENGINES if not groups else groups.pop(0) if len(groups) > 1 else groups[0])
        else:
            self.asked.append((self.path, self.headers["Authorization"], None))
            self._answer(200, {"operation_id": "scale-7", "error": None, "progress": 0.0, **self.told.pop(0)})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Authorization"], body))
        if body.get("workers") == 9:
            self._answer(400, {"error": {"message": "workers: expected 1 to 4, got 9"}})
        elif self.path == "/admin/engines":
            self._answer(202, {"data_parallel_size": 2, "data_parallel_size_before": self.before})
        else:
            already = {"phase": "completed", "reason": "there are 3 workers already"}
            begun = {"phase": "preparing", "reason": "w2 to leave"}
            self._answer(202, {"operation_id": "scale-7", **(already if body.get("workers") == 3 else begun)})

    def _answer(self, status: int, body: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Server.asked.clear()
    Server.groups.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_groups_and_workers_are_changed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--url", url]) == 0
    listed = (
        "group 0: ready, 2 workers (4 wanted), 3 running requests\ngroup 1: retiring, 2 workers, 0 running requests\n"
        "group 2: not ready: starting, 1 of 2 workers ready\ngroup 3: ready, 1 worker, 1 running request\n"
    )
    assert capsys.readouterr().out == listed
    assert main(["scale", "--url", url, "--data-parallel-size", "2", "--api-key", "k"]) == 0
    follow = f"how far it is: emoe scale --url {url}; --wait waits for its end\n"
    assert capsys.readouterr().out == "from 1 group to 2\n" + follow + listed
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


def test_groups_are_waited_for(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_moe.deploy.calls.scale.LOOK_S", 0.01)
    asked = ["scale", "--url", url, "--data-parallel-size", "2", "--wait"]
    monkeypatch.setattr(Server, "before", 3)
    Server.groups[:] = [
        [group(0), group(1, ready=False), group(2, retiring=True)],
        [group(0), group(1, ready=False), group(2, retiring=True)],
        [group(0), group(1), group(2, retiring=True)],
        [group(0), group(1)],
    ]
    assert main(asked) == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "from 3 groups to 2",
        "1 of 2 groups ready; group 1: starting; 1 group to leave",
        "2 of 2 groups ready; 1 group to leave",
        "completed: 2 groups serve",
    ]
    # it never will
    Server.groups[:] = [[group(0), group(1, ready=False, error="no memory")]]
    assert main(asked) == 2
    assert "group 1 will not serve: no memory" in capsys.readouterr().err
    # somebody else wants another number
    monkeypatch.setattr("elastic_moe.deploy.calls.scale.HEARD_S", 0.05)
    Server.groups[:] = [[group(0)]]
    assert main(asked) == 2
    assert "another call has asked for 1 group meanwhile" in capsys.readouterr().err


def test_what_there_is_already_is_not_followed(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Server.groups[:] = [[group(0), group(1)]]
    monkeypatch.setattr(Server, "before", 2)
    listed = "group 0: ready, 1 worker, 1 running request\ngroup 1: ready, 1 worker, 1 running request\n"
    assert main(["scale", "--url", url, "--data-parallel-size", "2"]) == 0
    assert capsys.readouterr().out == "there are 2 groups already\n" + listed
    for wait in ([], ["--wait"]):
        assert main(["scale", "--url", url, "--workers", "3", *wait]) == 0
        assert capsys.readouterr().out == "operation scale-7: there are 3 workers already\n" + listed


def test_the_url_of_a_client_is_taken(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for form in (f"{url}/v1", f"{url}/v1/", f"{url}/"):
        assert main(["scale", "--url", form, "--engine", "1"]) == 0
        assert capsys.readouterr().out == "group 1: retiring, 2 workers, 0 running requests\n"
    assert server_url("https://v1/llm/v1") == "https://v1/llm"
    assert server_url("https://v1") == "https://v1"


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
        (["--url", f"{url}/?engine=1", "--workers", "2"], "--url: expected http://HOST:PORT"),
        (["--url", url, "--wait"], "--wait: needs --workers, --retire or --data-parallel-size"),
    ):
        assert main(["scale", *arguments]) == 2
        assert words in capsys.readouterr().err
