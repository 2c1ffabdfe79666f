"""Requests to a server with an admin's key, and what the server says against one."""

from __future__ import annotations

import json
import re
import reprlib
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from elastic_moe.cluster.errors import ConfigError

URL = "http://127.0.0.1:8000"
"""Where a server is that was started without --host and --port."""

MOST_BYTES = 64 << 20
"""Most bytes of an answer that are read. 64 workers of 58 layers with 256 experts make less than a megabyte."""


def server_url(text: str) -> str:
    """The address that --url gives, without a slash at its end, and without the /v1 of OpenAI's clients, below which
    there are no admin calls. Raises ConfigError where it is none of a server."""
    try:
        parts = urlsplit(text)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        is_one = is_one and not (parts.query or parts.fragment)
    except ValueError:
        # brackets that do not match, or a port that is no number
        is_one = False
    if is_one:
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return f"{parts.scheme}://{parts.netloc}{path}"
    hint = f"; http://{text} has the scheme" if re.fullmatch(r"[\w.-]+(:\d+)?/?", text) else ""
    raise ConfigError(f"--url: expected http://HOST:PORT or https://HOST:PORT, got {reprlib.repr(text)}{hint}")


def request_with_key(url: str, api_key: str | None, data: bytes | None = None) -> urllib.request.Request:
    """A GET, or a POST of the JSON `data`. Raises ValueError for a URL that is none."""
    request = urllib.request.Request(url, data, {} if data is None else {"Content-Type": "application/json"})
    if api_key is not None:
        # a redirect to another host must not carry it there
        request.add_unredirected_header("Authorization", f"Bearer {api_key}")
    return request


def message_of(error: urllib.error.HTTPError) -> str:
    """The message of OpenAI's error object; the status where there is none."""
    try:
        return str(json.loads(error.read(MOST_BYTES))["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"
