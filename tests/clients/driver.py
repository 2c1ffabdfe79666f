"""Third-party clients against a real server with the built-in model: `make test-clients`.

Each client has an environment of its own under build/clients, made once by pip or npm; one that cannot be made is
skipped. Every client runs the same checks, and a table says what came of them. Fails where a check fails.

    python -m tests.clients.driver                   start a server, make the environments, run everything
    python -m tests.clients.driver --only openai --url http://localhost:8000
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from tests.clients.clients import CLIENTS, Client
from tests.paths import ROOT

SCRIPTS = Path(__file__).parent / "scripts"
ENVIRONMENTS = ROOT / "build" / "clients"
CHECKS = ("chat", "stream", "structured", "tools", "logprobs")
MODEL = "emoe-mini"
START_S, INSTALL_S, RUN_S = 180.0, 900.0, 300.0


class Skipped(Exception):
    """A client's environment cannot be made, for the reason given."""


def main() -> int:
    # so that a server never outlives what asks it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of clients")
    parser.add_argument("--url", help="a server that runs already, such as http://localhost:8000")
    parser.add_argument("--no-install", action="store_true", help="skip clients whose environment is not made yet")
    args = parser.parse_args()
    clients = [client for client in CLIENTS if not args.only or client.name in args.only]
    ready: dict[str, str] = {}
    for client in clients:
        try:
            ready[client.name] = installed(client, may_install=not args.no_install)
        except Skipped as reason:
            sys.stdout.write(f"{client.name}: skipped: {reason}\n")
    with server(args.url) as url:
        results: dict[str, dict[str, str]] = {}
        for client in clients:
            if client.name in ready:
                results[client.name] = run(client, url)
                sys.stdout.write(f"{client.name}: {results[client.name]}\n")
                sys.stdout.flush()
    sys.stdout.write(table(results, ready))
    failed = [f"{name}, {check}: {what}" for name, checks in results.items() for check, what in checks.items()
              if what not in ("ok", "-")]  # fmt: skip
    sys.stdout.write("".join(f"FAILED {line}\n" for line in failed))
    return 1 if failed else 0


def table(results: dict[str, dict[str, str]], versions: dict[str, str]) -> str:
    """What came of each client's checks, in Markdown."""
    lines = ["| client | version | " + " | ".join(CHECKS) + " |", "|---" * (len(CHECKS) + 2) + "|"]
    for name, checks in results.items():
        marks = [what if what in ("ok", "-") else "FAILED" for what in (checks.get(check, "-") for check in CHECKS)]
        lines.append(f"| {name} | {versions[name]} | " + " | ".join(marks) + " |")
    return "\n".join(["", *lines, "", ""])


def installed(client: Client, *, may_install: bool) -> str:
    """Make the client's environment, if it is not there yet. Returns the client's version. Raises Skipped."""
    directory = ENVIRONMENTS / client.name
    done = directory / ".installed"
    if not done.exists():
        if not may_install:
            raise Skipped("not installed")
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        if client.in_python:
            _install([sys.executable, "-m", "venv", str(directory)], directory)
            _install([str(directory / "bin" / "pip"), "install", "-q", *client.packages], directory)
        elif shutil.which("npm") is None:
            raise Skipped("there is no npm")
        else:
            _install(["npm", "install", "--no-audit", "--no-fund", "--silent", *client.packages], directory)
        done.touch()
    return version(client, directory)


def _install(command: list[str], directory: Path) -> None:
    try:
        made = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except subprocess.TimeoutExpired:
        raise Skipped(f"{command[0]} takes more than {INSTALL_S:.0f} s") from None
    if made.returncode != 0:
        raise Skipped(f"it cannot be installed: {(made.stderr or made.stdout).strip().splitlines()[-1:]}")


def version(client: Client, directory: Path) -> str:
    package = client.packages[0].split("[")[0]
    if not client.in_python:
        return str(json.loads((directory / "node_modules" / package / "package.json").read_text())["version"])
    paths = [str(path) for path in directory.glob("lib/python*/site-packages")]
    return next(metadata.distributions(name=package, path=paths)).version


def run(client: Client, url: str) -> dict[str, str]:
    """The results of the client's checks, by their names."""
    directory = ENVIRONMENTS / client.name
    script = SCRIPTS / client.script
    program = [str(directory / "bin" / "python")] if client.in_python else ["node"]
    if not client.in_python:
        # modules are looked for beside the script that imports them
        for file in SCRIPTS.glob("*.mjs"):
            shutil.copy(file, directory)
        script = directory / client.script
    command = [*program, str(script), f"{url}/v1", MODEL]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=RUN_S, check=False)
    except subprocess.TimeoutExpired:
        return {"chat": f"the script takes more than {RUN_S:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return {"chat": f"the script fails: {' '.join(done.stderr.split())[-400:]}"}
    results: dict[str, str] = json.loads(lines[-1])
    return results


@contextmanager
def server(url: str | None) -> Iterator[str]:
    """The address of a server with the built-in model: the given one, or one that is started and ended here."""
    if url is not None:
        yield url.rstrip("/")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "emoe"),
        "serve",
        "--workers",
        "1",
        "--no-standby",
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(address, process)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server does not start")


if __name__ == "__main__":
    sys.exit(main())
