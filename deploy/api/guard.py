"""The outermost layer of the API: it checks the caller and the key, and catches every exception.

`access` lists the open routes; a route that it does not know needs `api_key`. Admin calls that change something need
`admin_api_key`; where no such key is set, they are served only if the server is bound to loopback.
"""

from __future__ import annotations

import enum
import logging
import secrets

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic_moe.actors.telemetry.spans import trace_parent
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.peers import PEER_HEADER, Networks, client_address, is_allowed_host, is_loopback
from elastic_moe.deploy.api.http_io import error_response

logger = logging.getLogger(__name__)

API_KEY = "the server's API key (--api-key)"
ADMIN_READ_KEY = "the server's admin read key (--admin-read-key) or its admin key"
ADMIN_KEY = "the server's admin key (--admin-api-key)"

READING = ("GET", "HEAD", "OPTIONS")
POLICY_VIOLATION = 1008
"""The code with which a refused WebSocket is closed."""


class Access(enum.Enum):
    """The key that a request needs."""

    OPEN = enum.auto()
    API_KEY = enum.auto()
    ADMIN_READ_KEY = enum.auto()
    ADMIN_KEY = enum.auto()


OPEN = ("/health", "/ping", "/ready", "/version", "/", "/docs", "/openapi.json")
PAGE = "/page/"
"""The page's own files: text that everybody may read in the repository."""
ADMIN_READ = ("/metrics", "/load", "/is_scaling_elastic_ep")
ADMIN = ("/admin", "/scale_elastic_ep")


def access(method: str, path: str) -> Access:
    """The key that a call of `path` needs. A route that is not listed here needs `api_key`."""
    if path in OPEN or path.startswith(PAGE):
        return Access.OPEN
    if path in ADMIN_READ:
        return Access.ADMIN_READ_KEY
    if any(path == root or path.startswith(root + "/") for root in ADMIN):
        return Access.ADMIN_READ_KEY if method in READING else Access.ADMIN_KEY
    return Access.API_KEY


class Guard:
    """ASGI middleware. It answers the requests that it refuses, and answers 500 where the application raises."""

    def __init__(self, app: ASGIApp, *, config: ServeConfig) -> None:
        self._app = app
        self._local_only = is_loopback(config.host)
        self._api_key = config.api_key
        self._admin_key = config.admin_api_key
        self._admin_read_key = config.admin_read_key
        self._trusted = Networks.parse(config.forwarded_allow_ips)
        hosts = (host.strip().lower() for host in (config.allowed_hosts or "").split(","))
        self._allowed_hosts = (config.host.lower(), *filter(None, hosts))
        self._root_path = config.root_path
        self._traced = config.otlp_traces_endpoint is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._root_path and scope["path"] == self._root_path:
            # the links of the page at / are relative
            await RedirectResponse(self._root_path + "/")(scope, receive, send)
            return
        scope = self._without_root(scope)
        if self._traced:
            trace_parent.set(Headers(scope=scope).get("traceparent"))
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._check(scope)
            await self._app(self._with_client(scope), receive, watched_send)
        except Exception as error:
            # a traceback must not reach a client
            if started:
                logger.exception("internal error after the response had begun")
            else:
                await error_response(error)(scope, receive, send)

    def _without_root(self, scope: Scope) -> Scope:
        """`scope` with the path that our routes have: a proxy may pass --root-path on."""
        root, path = self._root_path, scope["path"]
        return {**scope, "path": path[len(root) :]} if root and path.startswith(root + "/") else scope

    def _check(self, scope: Scope) -> None:
        """Raises RequestError 401 or 403 where the caller may not make this call."""
        headers = Headers(scope=scope)
        if self._local_only:
            self._check_local(scope, headers)
        match access(scope["method"], scope["path"]):
            case Access.API_KEY if self._api_key is not None:
                _check_key(headers, API_KEY, self._api_key)
            case Access.ADMIN_READ_KEY if self._admin_read_key is not None:
                _check_key(headers, ADMIN_READ_KEY, self._admin_read_key, *filter(None, [self._admin_key]))
            case Access.ADMIN_KEY:
                self._check_admin(headers)

    def _check_local(self, scope: Scope, headers: Headers) -> None:
        if not _is_local(scope):
            raise RequestError("this server is bound to loopback: it answers only callers on its machine", status=403)
        if "host" in headers and not is_allowed_host(headers["host"], self._allowed_hosts):
            raise RequestError(
                f"this server is bound to loopback and does not answer to the name {headers['host'][:100]!r}: "
                "use localhost, or start it with --allowed-hosts",
                code="host_not_allowed",
                status=403,
            )

    def _check_admin(self, headers: Headers) -> None:
        if self._admin_key is not None:
            _check_key(headers, ADMIN_KEY, self._admin_key)
        elif not self._local_only:
            raise RequestError(
                "admin calls that change something are off: the server is reachable from other machines and was "
                "started without --admin-api-key",
                code="admin_disabled",
                status=403,
            )
        elif "origin" in headers and not _is_own_origin(headers):
            # Otherwise any web page could make the user's browser post here. Our own page may: the name in Host has
            # been checked, so a stranger's page cannot pass as ours by a name that points to this machine.
            raise RequestError("admin calls from web pages need --admin-api-key", code="admin_disabled", status=403)

    def _with_client(self, scope: Scope) -> Scope:
        """`scope` with the address of the client itself, in place of HAProxy's or a reverse proxy's, and with the
        scheme that the client used."""
        if not scope.get("client"):
            return scope
        headers = Headers(scope=scope)
        peer, port = scope["client"]
        # only HAProxy on this machine is trusted: a stranger who reaches the replica could write the header too
        peer = headers.get(PEER_HEADER, peer) if _is_local(scope) else peer
        scheme = headers.get("x-forwarded-proto", "") if peer in self._trusted else ""
        return {
            **scope,
            "client": (client_address(peer, headers.getlist("x-forwarded-for"), self._trusted), port),
            "scheme": scheme if scheme in ("http", "https") else scope["scheme"],
        }


def _check_key(headers: Headers, called: str, *keys: str) -> None:
    """Raises RequestError 401, which says by `called` what key the call needs, unless one of `keys` was sent."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise RequestError(
            f"no key: this call needs {called}, sent as 'Authorization: Bearer KEY'", code="invalid_api_key", status=401
        )
    right = [secrets.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if not any(right):
        raise RequestError(f"the key is wrong: this call needs {called}", code="invalid_api_key", status=401)


def _is_own_origin(headers: Headers) -> bool:
    """Whether the page that asks came from the host and port that it asks."""
    scheme, _, host = headers["origin"].lower().partition("://")
    return scheme in ("http", "https") and host == headers.get("host", "").lower()


def _is_local(scope: Scope) -> bool:
    """Whether the peer is on this machine.

    Ray Serve may make the replica listen on every interface, for its proxies. A connection from this machine to one of
    its own addresses has that address at both ends.
    """
    client, server = scope.get("client"), scope.get("server")
    if not client or is_loopback(client[0]):
        return True
    return server is not None and client[0] == server[0]
