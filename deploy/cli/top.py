"""The verb `emoe top`: a server's workers, loads and operations, drawn again and again in a terminal."""

from __future__ import annotations

import argparse
import http.client
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from elastic_moe.cluster.errors import ConfigError, UserError
from elastic_moe.cluster.setting import DAY_S, MILLION, number_flag
from elastic_moe.deploy.calls.requests import MOST_BYTES, URL, message_of, request_with_key, server_url

if TYPE_CHECKING:
    from rich.console import Console

    from elastic_moe.deploy.cli.top_look import Look
    from elastic_moe.deploy.cli.top_view import View

TIMEOUT_S = 5.0
"""Seconds to wait for one answer of the server."""


class NoAnswer(UserError):
    """No server answers at the URL, or not in time."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb; the parser's `run` takes the parsed arguments and returns the exit code."""
    what = "watch a server's workers, the load of their experts, and what moves"
    top = subparsers.add_parser("top", help=what, description=what.capitalize() + ".", allow_abbrev=False)
    top.add_argument("--url", default=URL, metavar="URL", help=f"address of the server ({URL})")
    top.add_argument("--api-key", metavar="KEY", help="sent with every question, for a server that asks for one")
    top.add_argument(
        "--engine",
        type=number_flag(int, 0, MILLION),
        metavar="N",
        help="number of the group whose workers and figures are shown; without it, figures are of all groups, and the "
        "rest is of group 0",
    )
    top.add_argument(
        "--interval",
        type=number_flag(float, 0.1, DAY_S),
        default=1.0,
        metavar="SECONDS",
        help="seconds between two looks (1)",
    )
    top.add_argument("--once", action="store_true", help="look twice, print what was seen, and end")
    top.set_defaults(run=run_top)


def run_top(args: argparse.Namespace) -> int:
    """Draw until Ctrl-C. Raises UserError if the server cannot be asked at all."""
    url = server_url(args.url)
    from rich.console import Console

    from elastic_moe.deploy.cli.top_view import render

    console = Console()
    if not args.once and not console.is_terminal:
        raise ConfigError("top draws on a terminal, and the output is none: --once prints what is seen")
    watch = _Watch(url, args.api_key, args.engine)
    view = watch.look()
    try:
        if args.once:
            time.sleep(args.interval)
            console.print(render(watch.look(), width=console.width, height=10_000))
        else:
            draw(console, watch.look, view, args.interval)
    except KeyboardInterrupt:
        pass
    return 0


def draw(console: Console, look: Callable[[], View], view: View, interval_s: float) -> None:
    """Draw the views that `look` returns, until it raises another error than NoAnswer."""
    from rich.live import Live

    from elastic_moe.deploy.cli.top_view import render

    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(render(view, width=console.width, height=console.height), refresh=True)
            time.sleep(interval_s)
            try:
                view = look()
            except NoAnswer as error:
                # it may come back: servers are restarted
                view = replace(view, away=str(error))


class _Watch:
    """Remembers the last look, and the tokens per second at each look."""

    def __init__(self, url: str, api_key: str | None, engine: int | None = None) -> None:
        from elastic_moe.deploy.cli.top_view import TREND_SHOWN

        self._url = url
        self._engine = engine
        self._api_key = api_key
        self._last: Look | None = None
        self._trend: deque[float] = deque(maxlen=TREND_SHOWN)

    def look(self) -> View:
        """Ask the server. Raises NoAnswer, and UserError if another program answers or the key is refused."""
        from elastic_moe.deploy.cli.top_look import PATHS, asked_path, rate, read_look
        from elastic_moe.deploy.cli.top_view import View

        answers = {path: ask(self._url + asked_path(path, self._engine), self._api_key) for path in PATHS}
        before, self._last = self._last, read_look(answers, time.monotonic(), self._engine)
        tokens = rate(before, self._last, "vllm:generation_tokens_total")
        if tokens is not None:
            self._trend.append(tokens)
        return View(url=self._url, now=self._last, before=before, trend=tuple(self._trend))


def ask(url: str, api_key: str | None) -> bytes | None:
    """The body of the answer; None if the server is there but cannot answer yet. Raises UserError."""
    try:
        with urllib.request.urlopen(request_with_key(url, api_key), timeout=TIMEOUT_S) as response:
            return bytes(response.read(MOST_BYTES))
    except urllib.error.HTTPError as error:
        return _refused(url, error)
    except urllib.error.URLError as error:
        raise NoAnswer(f"{url}: no server answers ({error.reason}); --url names another") from None
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(f"{url}: {error or type(error).__name__}") from None
    except ValueError as error:
        raise ConfigError(f"--url, --api-key: cannot be sent ({error})") from None


def _refused(url: str, error: urllib.error.HTTPError) -> bytes | None:
    if error.code in (401, 403):
        raise ConfigError(f"{url}: the server refuses to answer without the right key: --api-key") from None
    if error.code == 503:
        return error.read(MOST_BYTES) if url.endswith("/ready") else None
    if error.code == 400 and "?engine=" in url:
        raise ConfigError(f"--engine: {url.rpartition('/')[2]}: {message_of(error)}") from None
    if error.code >= 500:
        raise NoAnswer(f"{url}: HTTP {error.code}") from None
    raise ConfigError(f"{url}: HTTP {error.code}; is it a server of this project?") from None
