"""Who may call what: keys, callers on other machines, names of other servers, and the client's address."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Scope

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.guard import Access, Guard, access
from elastic_moe.deploy.api.service import Service
from tests.deploy.fakes import FakeBackend

KEYS = {"api_key": "user", "admin_api_key": "admin", "admin_read_key": "reader"}


def status_of(
    config: dict[str, Any],
    method: str = "GET",
    path: str = "/",
    *,
    headers: dict[str, str] | None = None,
    peer: str = "127.0.0.1",
    server: str = "127.0.0.1",
) -> tuple[int, Scope | None]:
    """What the guard answers; 200 where it lets the request through, and the scope that the application then sees."""
    seen: list[Scope] = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        seen.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "scheme": "http",
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        "client": (peer, 5),
        "server": (server, 8000),
    }
    asyncio.run(Guard(app, config=ServeConfig(**config))(scope, receive, send))
    return sent[0]["status"], seen[0] if seen else None


OPEN = {"/health", "/ping", "/ready", "/version", "/", "/page/{name}", "/docs", "/openapi.json"}


def test_every_route_has_its_key(model_dir: Path) -> None:
    """What is open is listed here a second time: a new route that is to be open must be written down twice."""
    app = create_app(Service(ServeConfig(), FakeBackend(), str(model_dir)))
    routes = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    by_access = {kind: {path for method, path in routes if access(method, path) is kind} for kind in Access}
    assert by_access[Access.OPEN] == OPEN
    assert by_access[Access.API_KEY] >= {"/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/models"}
    assert all(path.startswith("/admin") or path in ("/metrics", "/load", "/is_scaling_elastic_ep")
               for path in by_access[Access.ADMIN_READ_KEY])  # fmt: skip
    assert all(path.startswith("/admin/") or path == "/scale_elastic_ep" for path in by_access[Access.ADMIN_KEY])


@pytest.mark.parametrize(
    "path",
    ["//", "/page", "/pages/x", "/new", "/v2/completions", "/administration", "/health/x", "//health", "/HEALTH"],
)
def test_an_unknown_route_asks_for_the_key(path: str) -> None:
    assert access("GET", path) is Access.API_KEY
    assert status_of({"api_key": "user"}, path=path)[0] == 401


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        (None, {"open"}),
        ("user", {"open", "api"}),
        ("reader", {"open", "read"}),
        ("admin", {"open", "read", "admin"}),
        ("wrong", {"open"}),
    ],
)
def test_each_key_opens_its_own(key: str | None, allowed: set[str]) -> None:
    calls = {"open": ("GET", "/ready"), "api": ("POST", "/v1/completions"), "read": ("GET", "/admin/placement"),
             "admin": ("POST", "/admin/scale")}  # fmt: skip
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    opened = {name for name, call in calls.items() if status_of(KEYS, *call, headers=headers)[0] == 200}
    assert opened == allowed
    assert (status_of(KEYS, "GET", "/metrics", headers=headers)[0] == 200) == ("read" in allowed)


def test_reading_is_open_unless_a_key_is_set() -> None:
    for path in ("/metrics", "/admin/workers"):
        assert status_of({"api_key": "a", "admin_api_key": "b"}, "GET", path)[0] == 200
        assert status_of({"admin_read_key": "c"}, "GET", path)[0] == 401
        # the admin key is not asked for where there is none, and not everything matches what is not there
        assert status_of({"admin_read_key": "c"}, "GET", path, headers={"authorization": "Bearer None"})[0] == 401


@pytest.mark.parametrize(
    ("config", "host", "status"),
    [
        ({}, "localhost:8000", 200),
        ({}, "evil.example", 403),
        ({"allowed_hosts": "a.example, b.example"}, "b.example:443", 200),
        ({"allowed_hosts": "*"}, "evil.example", 200),
        ({"host": "localhost"}, "evil.example", 403),
        # whoever listens on other addresses has names that nobody knows here
        ({"host": "0.0.0.0"}, "emoe.example", 200),
    ],
)
def test_names_of_others(config: dict[str, Any], host: str, status: int) -> None:
    assert status_of(config, headers={"host": host})[0] == status
    assert status_of(config)[0] == 200


@pytest.mark.parametrize(
    ("config", "headers", "peer", "client"),
    [
        # behind a reverse proxy on this machine, a server on loopback serves
        ({}, {"x-forwarded-for": "9.9.9.9"}, "127.0.0.1", "9.9.9.9"),
        ({}, {"x-emoe-peer": "127.0.0.1", "x-forwarded-for": "9.9.9.9"}, "127.0.0.1", "9.9.9.9"),
        ({"forwarded_allow_ips": ""}, {"x-forwarded-for": "9.9.9.9"}, "127.0.0.1", "127.0.0.1"),
        ({"host": "0.0.0.0"}, {"x-emoe-peer": "10.0.0.4", "x-forwarded-for": "9.9.9.9"}, "127.0.0.1", "10.0.0.4"),
        (
            {"host": "0.0.0.0", "forwarded_allow_ips": "10.0.0.0/8"},
            {"x-emoe-peer": "10.0.0.4", "x-forwarded-for": "9.9.9.9"},
            "127.0.0.1",
            "9.9.9.9",
        ),
        # who reaches the replica past HAProxy writes what he wants
        ({"host": "0.0.0.0"}, {"x-emoe-peer": "127.0.0.1", "x-forwarded-for": "9.9.9.9"}, "10.0.0.4", "10.0.0.4"),
    ],
)
def test_the_application_sees_the_client(
    config: dict[str, Any], headers: dict[str, str], peer: str, client: str
) -> None:
    status, scope = status_of(config, headers=headers, peer=peer)
    assert status == 200
    assert scope is not None
    assert scope["client"][0] == client


def test_no_header_makes_a_stranger_local() -> None:
    for headers in ({"x-emoe-peer": "127.0.0.1"}, {"x-forwarded-for": "127.0.0.1"}):
        assert status_of({}, headers=headers, peer="10.0.0.9")[0] == 403


def test_websockets_are_refused() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def fail(*_: Any) -> None:
        raise AssertionError

    asyncio.run(Guard(fail, config=ServeConfig())({"type": "websocket"}, fail, send))
    assert [message["type"] for message in sent] == ["websocket.close"]
