"""`make test-schema`: schemathesis over openapi.json finds no status from 500 on, and no answer that is not described.

First over every call, with the fake backend of the tests in place of a cluster, so that calls which change the cluster
can be tried too; then over a real server, where those ask for a key that schemathesis does not have.

    python -m tests.evals.schema [--examples N]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
import threading
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.launch.local_ray import free_port
from tests.deploy.fakes import FakeBackend, make_tokenizer
from tests.e2e.conftest import READY_S, kill_family, start

HOME = Path(__file__).parents[2] / "build" / "schemathesis"
PACKAGE = "schemathesis==4.32.5"
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_headers_conformance", "response_schema_conformance"),
)
UNSUPPORTED = "unsupported_method"
"""A check that expects 405. It fits where no key is asked for: without one, any method gets 401."""
ENDLESS = "/admin/events"
"""The path whose answer does not end."""


def command() -> Path:
    """schemathesis in an environment of its own, which is made when it is first needed."""
    if not (HOME / "bin" / "schemathesis").exists():
        venv.create(HOME, with_pip=True)
        subprocess.run([HOME / "bin" / "python", "-m", "pip", "install", "-q", PACKAGE], check=True)
    return HOME / "bin" / "schemathesis"


def check(url: str, examples: int, checks: Sequence[str]) -> int:
    arguments = [
        *("run", f"{url}/openapi.json", "--checks", ",".join(checks), "--exclude-path", ENDLESS),
        *("--max-examples", str(examples), "--request-timeout", "30", "--workers", "2", "--seed", "1"),
    ]
    return subprocess.run([command(), *arguments], check=False).returncode


@contextlib.contextmanager
def faked(directory: Path) -> Iterator[str]:
    """The application over the fake backend, at a port. Yields its address."""
    make_tokenizer(directory)
    port = free_port()
    service = Service(ServeConfig(), FakeBackend(), str(directory))
    asyncio.run(service.begin())
    config = uvicorn.Config(create_app(service), port=port, lifespan="off", log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        service.close()


def main(arguments: Sequence[str] | None = None) -> int:
    # so that a server never outlives what asks it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=50, help="examples for each call")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        print("over the fake backend", flush=True)
        with faked(Path(temporary) / "tiny-moe") as url:
            failed = check(url, given.examples, [*CHECKS, UNSUPPORTED])
        print("over a real server", flush=True)
        flags = ["--workers", "2", "--rebalance-interval", "0", "--no-standby", "--admin-api-key", "unknown"]
        server = start(flags, Path(temporary) / "server.log")
        try:
            server.wait("readiness", server.ready, READY_S)
            return check(server.url, given.examples, CHECKS) or failed
        finally:
            kill_family(server)


if __name__ == "__main__":
    sys.exit(main())
