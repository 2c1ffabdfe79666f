"""The verb `emoe scale`: changes the number of groups of a server, or the workers of one of them, and lists them."""

from __future__ import annotations

import argparse
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_moe.cluster.config import MOST_WORKERS
from elastic_moe.cluster.errors import ConfigError, UserError
from elastic_moe.cluster.lines import counted, expected_engine, present
from elastic_moe.cluster.setting import number_flag
from elastic_moe.deploy.calls.requests import URL, message_of, request_with_key, server_url

LOOK_S = 0.5
"""Seconds between two looks at an operation, or at the groups."""
HEARD_S = 5.0
"""Seconds after which every API replica has heard of a change of the number of groups."""
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
    scale.add_argument("--url", default=URL, metavar="URL", help=f"address of the server ({URL})")
    scale.add_argument("--api-key", metavar="KEY", help="the server's --admin-api-key, if it has one")
    scale.add_argument(
        "--data-parallel-size", type=number_flag(int, 1, MOST_WORKERS), metavar="N", help="number of groups afterwards"
    )
    scale.add_argument(
        "--workers",
        type=number_flag(int, 0, MOST_WORKERS),
        metavar="N",
        help="number of workers of the group afterwards",
    )
    scale.add_argument("--retire", action="append", metavar="WORKER", help="a worker to retire; may be repeated")
    scale.add_argument(
        "--engine", type=number_flag(int, 0, MOST_WORKERS - 1), metavar="N",
        help="number of the group that is changed (0), and listed (all)",
    )  # fmt: skip
    scale.add_argument(
        "--wait",
        action="store_true",
        help="wait until the change is done, and tell how far it is; exit code 2 if it fails",
    )
    scale.set_defaults(run=run_scale)


def run_scale(args: argparse.Namespace) -> int:
    """Raises UserError with what the server says against it."""
    url = server_url(args.url)
    change = {name: getattr(args, name) for name in ("workers", "retire") if getattr(args, name) is not None}
    if args.wait and not change and args.data_parallel_size is None:
        raise ConfigError("--wait: needs --workers, --retire or --data-parallel-size, for whose end it waits")
    if args.data_parallel_size is not None:
        if change or args.engine is not None:
            raise ConfigError(
                "--data-parallel-size: cannot be given with --workers, --retire or --engine, which are about one group"
            )
        _scale_groups(url, args.api_key, args.data_parallel_size, wait=args.wait)
    elif change:
        _scale_workers(url, args.api_key, change, f"?engine={args.engine or 0}", wait=args.wait)
    engines = _call(f"{url}/admin/engines", args.api_key)
    if args.engine is not None and args.engine >= len(engines):
        raise ConfigError(f"--engine: expected {expected_engine(len(engines))}, got {args.engine}")
    for engine in engines:
        if args.engine in (None, engine["engine"]):
            print(_line(engine))
    return 0


def _scale_workers(url: str, api_key: str | None, change: Mapping[str, Any], of_group: str, *, wait: bool) -> None:
    """Change the workers of a group. `of_group`: the query that names it. Raises UserError."""
    told = _call(f"{url}/admin/scale{of_group}", api_key, change)
    name = told["operation_id"]
    print(f"operation {name}: {told['reason']}")
    where = f"{url}/admin/operations/{name}{of_group}"
    if told["phase"] == "completed":
        # there was nothing to change
        return
    if wait:
        _wait(where, api_key)
    else:
        print(f"how far it is: curl '{where}'; --wait waits for its end")


def _scale_groups(url: str, api_key: str | None, number: int, *, wait: bool) -> None:
    """Change the number of groups. Raises UserError."""
    told = _call(f"{url}/admin/engines", api_key, {"data_parallel_size": number})
    before = told["data_parallel_size_before"]
    if before == number:
        print(present(number, "group"))
    else:
        print(f"from {counted(before, 'group')} to {number}")
    if wait:
        _wait_for_groups(url, api_key, number)
    elif before != number:
        print(f"how far it is: emoe scale{'' if url == URL else f' --url {url}'}; --wait waits for its end")


def _wait_for_groups(url: str, api_key: str | None, number: int) -> None:
    """Tell how far it is until `number` groups serve, and no other is left. Raises UserError if one of them will never
    serve, if another call asks for another number, or if the server cannot be asked."""
    before, begun = "", time.monotonic()
    while True:
        engines = _call(f"{url}/admin/engines", api_key)
        wanted = [engine for engine in engines if not engine["retiring"]]
        if len(wanted) != number and time.monotonic() - begun > HEARD_S:
            raise UserError(f"another call has asked for {counted(len(wanted), 'group')} meanwhile")
        if failed := [engine for engine in wanted if engine["error"] is not None]:
            raise UserError(f"group {failed[0]['engine']} will not serve: {failed[0]['error']}")
        serving = sum(engine["ready"] for engine in wanted)
        if serving == len(engines) == number:
            print("completed: 1 group serves" if number == 1 else f"completed: {number} groups serve")
            return
        line = _groups_line(wanted, serving, number, len(engines) - len(wanted))
        if line != before:
            print(line, flush=True)
        before = line
        time.sleep(LOOK_S)


def _groups_line(wanted: Sequence[Mapping[str, Any]], serving: int, number: int, retiring: int) -> str:
    """How far the groups are, in a line."""
    late = [f"group {engine['engine']}: {engine['reason']}" for engine in wanted if not engine["ready"]]
    leaving = [f"{counted(retiring, 'group')} to leave"] if retiring else []
    return "; ".join([f"{serving} of {counted(number, 'group')} ready", *late, *leaving])


def _wait(url: str, api_key: str | None) -> None:
    """Tell how far the operation is until it has ended. Raises UserError if it fails, or the server cannot be asked."""
    before = ""
    while True:
        told = _call(url, api_key)
        phase, error = told["phase"], told["error"]
        if phase == "failed":
            raise UserError(f"operation {told['operation_id']} has failed: {error}")
        if phase == "completed":
            print(f"completed: {told['reason']}")
            return
        line = f"{phase}, {told['progress']:.0%}" + ("" if error is None else f" (it is tried again: {error})")
        if line != before:
            print(line, flush=True)
        before = line
        time.sleep(LOOK_S)


def _line(engine: Mapping[str, Any]) -> str:
    """A group in a line. The server leaves out what it cannot tell now, such as of a group that starts."""
    begin = f"group {engine['engine']}: "
    if not engine["ready"] and not engine["retiring"]:
        # the reason says how many workers there are, and none of them serves
        return f"{begin}not ready: {engine['reason']}"
    parts = ["retiring" if engine["retiring"] else "ready"]
    if engine["workers"] is not None:
        changing = not engine["retiring"] and engine["target"] not in (None, engine["workers"])
        parts.append(counted(engine["workers"], "worker") + (f" ({engine['target']} wanted)" if changing else ""))
    if engine["running"] is not None:
        parts.append(counted(engine["running"], "running request"))
    return begin + ", ".join(parts)


def _call(url: str, api_key: str | None, body: Mapping[str, Any] | None = None) -> Any:
    """The JSON of the answer. Raises UserError."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(request_with_key(url, api_key, data), timeout=TIMEOUT_S) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: {message_of(error)}") from None
    except urllib.error.URLError as error:
        raise UserError(f"{url}: no server answers ({error.reason}); --url names another") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {error or type(error).__name__}") from None
    except ValueError as error:
        raise ConfigError(f"{url}: not an answer of this project's server ({error})") from None
