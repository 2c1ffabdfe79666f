"""A spot machine's notice: asked for as each cloud wants it, and passed on to the process that must end."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from elastic_moe.deploy.cli.main import main
from elastic_moe.deploy.joined import notice
from elastic_moe.deploy.joined.notice import Cloud, asking, has_notice, run


class Metadata(HTTPServer):
    """Both clouds' metadata services. `ending`: whether there is notice."""

    def __init__(self) -> None:
        self.ending = False
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        ok = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"] == "60"
        self._answer(200 if ok else 400, "secret")

    def do_GET(self) -> None:
        ending = self.server.ending
        if self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self._answer(200, "TRUE" if ending else "FALSE")
        elif self.path == "/latest/meta-data/spot/instance-action":
            known = self.headers["X-aws-ec2-metadata-token"] == "secret"
            self._answer(401 if not known else 200 if ending else 404, '{"action": "terminate"}')
        else:
            self._answer(400, "")

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("cloud", Cloud)
def test_notice_is_noticed(metadata: Metadata, cloud: Cloud) -> None:
    ask = asking(metadata.url)
    assert not has_notice(cloud, ask)
    metadata.ending = True
    assert has_notice(cloud, ask)


@pytest.mark.parametrize("cloud", Cloud)
def test_a_service_that_does_not_answer_gives_no_notice(cloud: Cloud) -> None:
    assert not has_notice(cloud, asking("http://127.0.0.1:1"))


ENDING = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def test_the_command_gets_sigterm_once_there_is_notice(tmp_path: Path) -> None:
    up = tmp_path / "up"
    assert run([sys.executable, "-c", ENDING, str(up)], up.exists, poll_s=0.05) == 7


def test_the_command_ends_by_itself(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(notice.SERVICES, Cloud.AWS, metadata.url)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["until-notice", "aws", sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert main(["until-notice", "aws", "sh", "-c", "kill -9 $$"]) == 137
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["until-notice", "gcp", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err
