"""Requests to a server with an admin's key, and what the server says against one."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

URL = "http://127.0.0.1:8000"
"""Where a server is that was started without --host and --port."""

MOST_BYTES = 64 << 20
"""Most bytes of an answer that are read. 64 workers of 58 layers with 256 experts make less than a megabyte."""


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
