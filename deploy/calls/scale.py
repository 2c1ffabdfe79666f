"""The verb `emoe scale`: changes the number of groups of a server, or the workers of one of them, and lists them."""

from __future__ import annotations

import argparse
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from elastic_moe.cluster.errors import ConfigError, UserError
from elastic_moe.deploy.calls.requests import message_of, request_with_key

TIMEOUT_S = 60.0
"""Seconds to wait for one answer of the server."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb; the parser's `run` takes the parsed arguments and returns the exit code."""
    scale = subparsers.add_parser(
        "scale",
        help="change a server's number of groups, or of workers, while it serves",
        description="Change a server's number of groups of workers, or the workers of one group, while it serves. "
        "Without a change, print the groups.",
        allow_abbrev=False,
    )
    scale.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (http://127.0.0.1:8000)")
    scale.add_argument("--api-key", metavar="KEY", help="the admin's key, for a server that asks for one")
    scale.add_argument("--data-parallel-size", type=int, metavar="N", help="number of groups afterwards")
    scale.add_argument("--workers", type=int, metavar="N", help="number of workers of the group afterwards")
    scale.add_argument("--retire", action="append", metavar="WORKER", help="a worker to retire; may be repeated")
    scale.add_argument("--engine", type=int, default=0, metavar="N", help="number of the group that is meant (0)")
    scale.set_defaults(run=run_scale)


def run_scale(args: argparse.Namespace) -> int:
    """Raises UserError with what the server says against it."""
    url = args.url.rstrip("/")
    change = {name: getattr(args, name) for name in ("workers", "retire") if getattr(args, name) is not None}
    if args.data_parallel_size is not None and change:
        raise ConfigError("--data-parallel-size: cannot be changed in one call with --workers or --retire")
    if args.data_parallel_size is not None:
        told = _call(f"{url}/admin/engines", args.api_key, {"data_parallel_size": args.data_parallel_size})
        print(f"from {told['data_parallel_size_before']} to {told['data_parallel_size']} groups")
    elif change:
        told = _call(f"{url}/admin/scale?engine={args.engine}", args.api_key, change)
        print(f"operation {told['operation_id']}: {told['reason']}")
    for engine in _call(f"{url}/admin/engines", args.api_key):
        state = "retiring" if engine["retiring"] else "ready" if engine["ready"] else "not ready"
        print(f"group {engine['engine']}: {state}, {engine['workers']} workers, {engine['running']} running requests")
    return 0


def _call(url: str, api_key: str | None, body: Mapping[str, Any] | None = None) -> Any:
    """The JSON of the answer. Raises UserError."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(request_with_key(url, api_key, data), timeout=TIMEOUT_S) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: {message_of(error)}") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {error or type(error).__name__}") from None
    except ValueError as error:
        raise ConfigError(f"{url}: not an answer of this project's server ({error})") from None
