"""HTTP/1.0 clients get no chunks: where an answer's length is not known, the end of the connection ends the answer.

uvicorn's fast protocol sends chunks to every client, and HAProxy passes them on. This file makes uvicorn do otherwise,
by attributes of its class; tests/deploy/launch/test_haproxy.py holds that the installed uvicorn still has them.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http import httptools_impl

ENDLESS = 2**62
"""Length of an answer whose length is not known."""


class Cycle(httptools_impl.RequestResponseCycle):
    """One request and its response."""

    ends_with_connection = False

    async def send(self, message: Any) -> None:
        if self.scope["http_version"] == "1.0":
            self._without_chunks(message)
        await super().send(message)

    def _without_chunks(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            if not names & {b"content-length", b"transfer-encoding"} and message["status"] not in (204, 304):
                self.chunked_encoding, self.expected_content_length = False, ENDLESS
                self.ends_with_connection = True
        elif self.ends_with_connection and not message.get("more_body", False):
            self.expected_content_length = len(message.get("body", b""))


def serve_old_http() -> None:
    """Make every uvicorn server of this process do so, from its next request on."""
    vars(httptools_impl)["RequestResponseCycle"] = Cycle
