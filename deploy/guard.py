"""The outermost layer of the API: keys, callers from other machines, and a last net for exceptions.

Rules: `api_key`, where set, guards /v1, /tokenize and /detokenize. Admin calls that change something (and
/scale_elastic_ep, which is one) need
`admin_api_key`; without one they are served only if the server is bound to loopback.
"""

from __future__ import annotations

import logging
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.config import ServeConfig
from cluster.errors import RequestError
from deploy.http_io import error_response

logger = logging.getLogger(__name__)

LOOPBACK = ("127.", "::1", "localhost", "::ffff:127.")
GUARDED = ("/v1", "/tokenize", "/detokenize")
ADMIN = ("/admin", "/scale_elastic_ep")
READING = ("GET", "HEAD", "OPTIONS")


def is_loopback(host: str) -> bool:
    return host.startswith(LOOPBACK)


class Guard:
    """ASGI middleware. Answers what it refuses, and 500 where the application raises."""

    def __init__(self, app: ASGIApp, *, config: ServeConfig) -> None:
        self._app = app
        self._local_only = is_loopback(config.host)
        self._api_key = config.api_key
        self._admin_key = config.admin_api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, watched_send)
        except Exception as error:
            # no traceback may reach a client
            if started:
                logger.exception("internal error after the response had begun")
            else:
                await error_response(error)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises RequestError 401 or 403."""
        headers = Headers(scope=scope)
        path = scope["path"]
        if self._local_only and not _is_local(scope):
            raise RequestError("this server is bound to loopback: it answers only callers on its machine", status=403)
        if self._api_key is not None and _is_under(path, GUARDED):
            _check_key(headers, self._api_key)
        if _is_under(path, ADMIN) and scope["method"] not in READING:
            self._check_admin(headers)

    def _check_admin(self, headers: Headers) -> None:
        if self._admin_key is not None:
            _check_key(headers, self._admin_key)
        elif not self._local_only:
            raise RequestError(
                "admin calls that change something are off: the server is reachable from other machines and was "
                "started without --admin-api-key",
                code="admin_disabled",
                status=403,
            )
        elif "origin" in headers:
            # Any web page that the user looks at could make their browser post here.
            raise RequestError("admin calls from web pages need --admin-api-key", code="admin_disabled", status=403)


def _check_key(headers: Headers, key: str) -> None:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise RequestError("no API key: send it as 'Authorization: Bearer KEY'", code="invalid_api_key", status=401)
    if not secrets.compare_digest(given.strip().encode(), key.encode()):
        raise RequestError("the API key is wrong", code="invalid_api_key", status=401)


def _is_local(scope: Scope) -> bool:
    """Whether the peer is this machine. Ray Serve may have the replica itself listen on every interface, for its
    proxies; a connection from the machine to its own address has that address at both ends."""
    client, server = scope.get("client"), scope.get("server")
    if not client or is_loopback(client[0]):
        return True
    return server is not None and client[0] == server[0]


def _is_under(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)
