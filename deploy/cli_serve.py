"""`emoe serve`: check the model, start Ray and the application, say when it is ready, and clean up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from types import FrameType
from typing import Any

from cluster.collector import no_collection
from cluster.config import ServeConfig
from cluster.errors import ConfigError, EmoeError
from cluster.operations import ENDED
from cluster.protocol import ModelInfo, Readiness
from deploy.local_ray import ServerProcesses, check_port
from deploy.tokenizer_process import TokenizerProcess

POLL_S = 0.25
QUIET_S = 5.0
"""Without a terminal, the same progress is not said again before this."""


class ServerFailed(EmoeError):
    """The server cannot come up, or went down; the message says why."""


class _Stop(BaseException):
    """A signal asked for an orderly end."""


def serve(config: ServeConfig) -> int:
    """Blocks until a signal. Returns 0 after an orderly end; raises UserError and ServerFailed."""
    check_port(config.host, config.port)
    model_dir, model = _checked_model(config)
    processes = ServerProcesses(config)
    progress = _Progress()
    signals = _Signals(processes)
    signals.install()
    try:
        try:
            _start(processes, signals, progress, model_dir, model)
            _wait_until_ready(config, progress)
            progress.clear()
            print(f"serving {_name(config, model_dir)} on {_url(config)}", flush=True)
            _watch(config)
        except _Stop:
            progress.clear()
            print("stopping", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                processes.drain(config.shutdown_timeout)
    finally:
        progress.clear()
        processes.stop()
        signals.restore()
    if processes.hangs:
        os._exit(0)
    return 0


def _start(
    processes: ServerProcesses, signals: _Signals, progress: _Progress, model_dir: str, model: ModelInfo
) -> None:
    """Raises ServerFailed, in one line, for whatever Ray and Serve raise."""
    try:
        progress.show("starting Ray")
        processes.start_ray()
        signals.install()
        progress.show("starting the API")
        processes.start_app(model_dir, model)
        signals.install()
    except EmoeError:
        raise
    except Exception as error:
        raise ServerFailed(f"cannot start: {' '.join(str(error).split())[:500]}") from error


def _checked_model(config: ServeConfig) -> tuple[str, ModelInfo]:
    """The model's directory, and what it is. Raises CheckpointError and ConfigError before anything is started."""
    if config.model is None:
        from deploy.builtin import MODEL, MODEL_DIR, NOTICE

        print(NOTICE, file=sys.stderr, flush=True)
        model_dir, info = str(MODEL_DIR), MODEL
        if config.chat_template is not None:
            with TokenizerProcess(model_dir, config.chat_template) as process:
                process.wait()
    else:
        model_dir = os.path.abspath(os.path.expanduser(config.model))
        # in a process beside, while this one imports what a model needs
        with TokenizerProcess(model_dir, config.chat_template) as process:
            with no_collection():
                from model.checkpoint import open_checkpoint

            info = open_checkpoint(model_dir).info
            process.wait()
    if config.workers > info.num_logical_experts:
        raise ConfigError(
            f"workers: {config.workers} is more than the {info.num_logical_experts} experts of a layer; "
            "every worker holds at least one"
        )
    if config.max_model_len is not None and config.max_model_len > info.max_model_len:
        raise ConfigError(
            f"max_model_len: {config.max_model_len} is more than the {info.max_model_len} that the model allows"
        )
    return model_dir, info


class _Signals:
    """The first SIGINT or SIGTERM raises _Stop in the main thread, the second ends everything at once."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, processes: ServerProcesses) -> None:
        self._processes = processes
        self._seen = 0
        self._before = [(number, signal.getsignal(number)) for number in self.NUMBERS]

    def install(self) -> None:
        """To be called again after Ray has started: it puts its own handlers in."""
        for number in self.NUMBERS:
            signal.signal(number, self._handle)

    def restore(self) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._seen += 1
        if self._seen == 1:
            raise _Stop
        self._processes.kill()
        os._exit(128 + number)


def _wait_until_ready(config: ServeConfig, progress: _Progress) -> None:
    while True:
        state = _readiness(config)
        if state is None:
            progress.show("starting the API")
        elif state.error is not None:
            raise ServerFailed(state.error)
        elif state.ready:
            return
        else:
            progress.show(state.reason)
        time.sleep(POLL_S)


def _watch(config: ServeConfig) -> None:
    """Blocks while the server runs, and tells of recoveries and scaling. Raises ServerFailed where waiting is vain."""
    told: set[str] = set()
    while True:
        time.sleep(2.0)
        state = _readiness(config)
        if state is not None and state.error is not None:
            raise ServerFailed(state.error)
        for line in news(_get(config, "/admin/operations"), told):
            print(line, file=sys.stderr, flush=True)


def news(operations: Any, told: set[str]) -> list[str]:
    """A line for every recovery and scaling of GET /admin/operations that has ended since; their ids go into `told`."""
    lines: list[str] = []
    for operation in reversed(operations) if isinstance(operations, list) else ():
        name, phase = operation["operation_id"], operation["phase"]
        if operation["kind"] in ("recover", "scale") and phase in ENDED and name not in told:
            told.add(name)
            lines.append(f"{name} {phase}: {operation['error'] or operation['reason']}")
    return lines


def _readiness(config: ServeConfig) -> Readiness | None:
    """What /ready says, as a client would hear it; None where nobody answers."""
    body = _get(config, "/ready")
    if not isinstance(body, dict) or "ready" not in body:
        return None
    return Readiness(ready=bool(body["ready"]), reason=str(body.get("reason")), error=body.get("error"))


def _get(config: ServeConfig, path: str) -> Any:
    """The JSON that is answered, whatever the status; None where there is none."""
    try:
        with urllib.request.urlopen(_url(config) + path, timeout=5) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with contextlib.suppress(ValueError, OSError):
            return json.load(error)
        return None
    except (OSError, ValueError):
        return None


def _url(config: ServeConfig) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _name(config: ServeConfig, model_dir: str) -> str:
    return config.served_model_name or os.path.basename(model_dir.rstrip("/"))


class _Progress:
    """One line that is written over on a terminal; elsewhere a line for each change, not too many."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = ""
        self._said_at = 0.0

    def show(self, text: str) -> None:
        if text == self._last:
            return
        stage_changed = text.split(":")[0].split("(")[0] != self._last.split(":")[0].split("(")[0]
        if self._terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif stage_changed or time.monotonic() - self._said_at > QUIET_S:
            print(text, file=sys.stderr, flush=True)
            self._said_at = time.monotonic()
        self._last = text

    def clear(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
