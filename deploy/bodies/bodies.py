"""Reads the bodies of requests with a limit, and decodes and validates them without holding up a stream.

A small body is decoded at once. A large one goes to another process (deploy/bodies/aside.py). All large bodies that are
being read or decoded have a limit together, so that a burst of them takes a bounded amount of memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.bodies import json_text
from elastic_moe.deploy.bodies.aside import Aside
from elastic_moe.deploy.bodies.schema import BodyT, parse
from elastic_moe.deploy.bodies.unknown import UnknownFields

MAX_BODY_BYTES = 8 * 2**20
DISCARD_BYTES = 8 * MAX_BODY_BYTES
"""Most bytes of an oversized body that are read and thrown away, so that the client can read why it was refused."""
LARGE_BYTES = 2**16
"""Size from which on another process decodes a body. A smaller one takes a millisecond or two."""
UNDER_WAY_BYTES = 8 * MAX_BODY_BYTES
"""Most bytes of all large bodies that are being read or wait to be decoded."""
CURLS_OWN = ("application/x-www-form-urlencoded", "multipart/form-data")
"""What curl calls the body of -d and -F where nothing else is said."""


class Bodies:
    """Reads bodies, on one event loop."""

    def __init__(self, aside: Aside) -> None:
        self._aside = aside
        self._under_way_bytes = 0
        self._unknown = UnknownFields()

    async def read(self, request: Request, kind: type[BodyT]) -> BodyT:
        """The validated body. Raises RequestError: 413 for more than MAX_BODY_BYTES, 415 for another type than JSON,
        503 while too many large bodies are being read, and 400 for a fault in the body."""
        with self._counted() as counted:
            body = await self._read(request, counted)
            small = len(body) < LARGE_BYTES
            parsed = parse(kind, json_text.decode(body)) if small else await self._aside.parse(kind, body)
        if parsed.unknown:
            self._unknown.seen(parsed.unknown, request.url.path, time.monotonic())
        return parsed

    async def read_json(self, request: Request) -> Any:
        """The body as plain values. Raises RequestError as `read` does."""
        with self._counted() as counted:
            body = await self._read(request, counted)
            return json_text.decode(body) if len(body) < LARGE_BYTES else await self._aside.parse(None, body)

    async def _read(self, request: Request, counted: _Counted) -> bytearray:
        kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            text = f"Content-Type: expected application/json, got {kind[:80]}"
            if kind in CURLS_OWN:
                text += "; with curl, add -H 'Content-Type: application/json'"
            raise RequestError(text, code="unsupported_media_type", status=415)
        body = bytearray()
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > MAX_BODY_BYTES:
                body.clear()
                counted.set(0)
                if size > DISCARD_BYTES:
                    break
            else:
                body += part
                counted.set(size)
        if size > MAX_BODY_BYTES:
            raise RequestError(
                f"the body is larger than {MAX_BODY_BYTES // 2**20} MB", code="request_too_large", status=413
            )
        return body

    @contextlib.contextmanager
    def _counted(self) -> Iterator[_Counted]:
        counted = _Counted(self)
        try:
            yield counted
        finally:
            self._under_way_bytes -= counted.size_bytes

    def add(self, size_bytes: int) -> None:
        """Count `size_bytes` more. Raises RequestError 503 where that exceeds UNDER_WAY_BYTES."""
        if size_bytes > 0 and self._under_way_bytes + size_bytes > UNDER_WAY_BYTES:
            raise RequestError(
                f"more than {UNDER_WAY_BYTES // 2**20} MB of request bodies are being read; try again soon",
                code="too_many_large_requests",
                status=503,
            )
        self._under_way_bytes += size_bytes


class _Counted:
    """The counted size of one body. Small bodies do not count."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.size_bytes = 0

    def set(self, size_bytes: int) -> None:
        size_bytes = size_bytes if size_bytes >= LARGE_BYTES else 0
        self._bodies.add(size_bytes - self.size_bytes)
        self.size_bytes = size_bytes
