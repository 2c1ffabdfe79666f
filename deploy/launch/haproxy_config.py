"""Corrects the configuration that Ray Serve writes for HAProxy, and starts HAProxy with it.

Serve runs this file as if it were HAProxy, with an interpreter that sees no packages, so it imports the standard
library only. `corrected` is a function of the text and of our settings, so that a test can apply it to what the
installed Serve really writes.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn

ERRORS = {
    # HAProxy gives a client up that shuts its side of the connection down before it has the answer, as one that left
    400: (
        "the request is not valid HTTP, did not arrive whole, or its connection was closed for writing before the "
        "answer",
        "invalid_http",
    ),
    403: ("the request is refused", "forbidden"),
    408: ("the request did not arrive in time", "request_timeout"),
    413: ("the request is too large", "request_too_large"),
    429: ("too many connections from this address; close some first", "too_many_connections"),
    431: ("the headers are longer than 16 kB, or more than 100", "headers_too_large"),
    500: ("internal error; the server's log says more", "internal_error"),
    502: ("the API ended while it answered", "bad_gateway"),
    503: ("the API is not running", "not_ready"),
    504: ("the API did not answer in time", "gateway_timeout"),
}
"""Message and code of OpenAI's error object, by status, for the answers that HAProxy gives itself.

HAProxy has no page for a request that it cannot parse at all (no HTTP, more than HEADER_BUFFER_BYTES of headers): it
answers 400 in HTML, with a text from its binary."""
NO_PAGE = (431,)
"""Statuses for which HAProxy takes no file with a page."""
HEADER_BYTES = 16 * 2**10
HEADERS = 100
HEADER_BUFFER_BYTES = 64 * 2**10
"""Most bytes of headers that HAProxy reads. It reads more than it lets through, so that it can say what is wrong."""
RETRIED = (429, 502, 503, 504)
"""Statuses whose answers tell the client when to try again."""
REASONS = {
    400: "Bad Request",
    403: "Forbidden",
    408: "Request Timeout",
    413: "Content Too Large",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}
KINDS = {403: "permission_error", 429: "rate_limit_error", 503: "service_unavailable"}
Change = Callable[[re.Match[str]], str]
MARK = "# corrected\n"

_STATISTICS = r"(?=\n *(?:mode http\n *http-request use-service|stats enable))"
SERVE_LINES = {
    "address of the statistics pages": r"^( *bind) \*?:(\d+)" + _STATISTICS,
    "mode of the admin socket": r"(stats socket .*) mode 666 ",
    "size of a buffer": r"^ *tune.bufsize .*\n",
    "error pages": r"(?:^ *errorfile .*\n)+",
    "defaults": r"^defaults\n",
    "address of the frontend": r"^(frontend http_frontend\n) *bind (.*):(\d+)\n",
    "answer without an application": r"^ *http-request return status 404 .*/-/routes.*\n",
}
"""The lines of Serve's configuration that we change: a name for each, and the pattern that finds it."""


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """The values that our lines put into the configuration."""

    binary: str
    run_dir: str
    """The directory of the error pages."""
    host: str | None
    """The address that the server listens on, as the user gave it; None: the one that Serve was given."""
    peer_header: str
    """The header that carries the client's address to the replica."""
    header_timeout_s: float
    """Most seconds from the connection, or from a request's first byte, to its last header."""
    max_connections_per_address: int
    unbounded: tuple[str, ...] = ()
    """Addresses and networks that may open as many connections as they want."""


class UnknownConfiguration(Exception):
    """A line that must be changed is missing from the configuration that Serve has written."""


def corrected(config: str, wanted: Corrections) -> str:
    """`config` with every change of ours. Raises UnknownConfiguration where a change does not find its line."""
    if config.startswith(MARK):
        return config
    for name, change in _changes(wanted).items():
        config, count = re.subn(SERVE_LINES[name], change, config, flags=re.MULTILINE)
        if not count:
            raise UnknownConfiguration(
                f"{name}: this version of Ray Serve writes no line like {SERVE_LINES[name]!r} for HAProxy"
            )
    return MARK + config


def error_page(status: int) -> str:
    """A whole HTTP response with OpenAI's error object, or only the object where HAProxy writes the headers itself."""
    message, code = ERRORS[status]
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
    if status in NO_PAGE:
        return body
    lines = [f"HTTP/1.1 {status} {REASONS[status]}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    if status in RETRIED:
        lines.append("Retry-After: 2")
    return "\r\n".join([*lines, "Cache-Control: no-cache", "Connection: close", "", body])


def page_path(run_dir: str, status: int) -> str:
    return os.path.join(run_dir, f"{status}.http")


def _changes(wanted: Corrections) -> dict[str, Change]:
    """The replacement of each line, by its name in SERVE_LINES."""
    pages = [f"errorfile {status} {page_path(wanted.run_dir, status)}" for status in ERRORS if status not in NO_PAGE]
    sizes = [f"tune.bufsize {HEADER_BUFFER_BYTES}", f"tune.http.maxhdr {10 * HEADERS}"]
    return {
        # otherwise these pages would listen on every interface, without a key
        "address of the statistics pages": lambda found: f"{found[1]} 127.0.0.1:{found[2]}",
        "mode of the admin socket": lambda found: f"{found[1]} mode 600 ",
        "size of a buffer": lambda _: _block(sizes),
        "error pages": lambda _: _block(pages),
        "defaults": lambda found: found[0] + _block(_defaults(wanted)),
        "address of the frontend": lambda found: (
            found[1] + _block(_frontend(wanted, served_at=found[2], port=found[3]))
        ),
        # while no application runs, Serve's own answer is a 404 that names a page of Serve's
        "answer without an application": lambda _: _block(["http-request deny deny_status 503"]),
    }


def _defaults(wanted: Corrections) -> list[str]:
    return [
        f"timeout http-request {1000 * wanted.header_timeout_s:.0f}ms",
        # a connection that has sent nothing is closed without an answer, since its client expects none
        "option http-ignore-probes",
        "option disable-h2-upgrade",
    ]


def _frontend(wanted: Corrections, *, served_at: str, port: str) -> list[str]:
    most = wanted.max_connections_per_address
    unbounded = f"!{{ src {' '.join(wanted.unbounded)} }}" if wanted.unbounded else ""
    return [
        f"bind {served_at}:{port}" if wanted.host is None else f"bind {_listen(wanted.host, port)}",
        "stick-table type ipv6 size 100k expire 1m store conn_cur",
        "tcp-request connection track-sc0 src",
        f"tcp-request connection reject if {{ sc0_conn_cur gt {2 * most} }} {unbounded}",
        f"http-request deny deny_status 429 if {{ sc0_conn_cur gt {most} }} {unbounded}",
        *(
            f"http-request return status 431 content-type application/json file {page_path(wanted.run_dir, 431)} "
            f"hdr connection close if {{ {too_much} }}"
            for too_much in (
                f"req.hdrs,length gt {HEADER_BYTES}",
                f"url,length gt {HEADER_BYTES}",
                f"req.hdr_cnt gt {HEADERS}",
            )
        ),
        f"http-request set-header {wanted.peer_header} %[src]",
        # uvicorn and Serve answer their own errors in plain text; the API never answers in plain text
        *(
            f"http-response return status {status} default-errorfiles if {{ status {status} }} "
            "{ res.hdr(content-type) -m beg text/plain }"
            for status in ERRORS
            if status not in NO_PAGE
        ),
    ]


def _listen(host: str, port: str) -> str:
    """The address after `bind`. IPv6's wildcard takes IPv4 connections too, whatever the machine's default is.

    The host that Serve writes is not used: Serve would make replicas listen there too, and takes `::` for IPv4.
    """
    return f"[{host}]:{port}{' v4v6' * (host == '::')}" if ":" in host else f"{host}:{port}"


def _block(lines: Sequence[str]) -> str:
    return "".join(f"    {line.rstrip()}\n" for line in lines)


def write_pages(run_dir: str) -> None:
    for status in ERRORS:
        # as bytes, because HTTP's line ends must stay as they are
        with open(page_path(run_dir, status), "wb") as file:
            file.write(error_page(status).encode())


def write_options(path: str, wanted: Corrections) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(asdict(wanted), file)


def main(arguments: Sequence[str]) -> NoReturn:
    """`arguments` are the file of write_options, followed by the arguments for HAProxy. Does not return."""
    with open(arguments[0], encoding="utf-8") as file:
        options = json.load(file)
    start(Corrections(**{**options, "unbounded": tuple(options["unbounded"])}), arguments[1:])


def start(wanted: Corrections, arguments: Sequence[str]) -> NoReturn:
    """Correct the configuration that `arguments` name, and become HAProxy with them. Raises UnknownConfiguration."""
    for path in arguments:
        if path.endswith(".cfg"):
            with open(path, encoding="utf-8") as file:
                text = corrected(file.read(), wanted)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
    # -dS turns off splicing, with which HAProxy does not notice a client that hangs up before the response
    command = [wanted.binary, "-dS", *arguments]
    # HAProxy must not outlive Serve, even if everything above it is killed
    os.execvp(*_ending_with_parent(command))


def _ending_with_parent(command: list[str]) -> tuple[str, list[str]]:
    from shutil import which

    prefix = ["setpriv", "--pdeathsig", "KILL"] if which("setpriv") else []
    return (prefix + command)[0], prefix + command


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UnknownConfiguration as error:
        sys.exit(str(error))
