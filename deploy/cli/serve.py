"""`emoe serve`: checks the model, starts Ray and the application, says when the server is ready, and cleans up."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from elastic_moe.actors.description import describe
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.decisions.limits import check_groups, check_limits
from elastic_moe.cluster.errors import ConfigError, EmoeError, UserError
from elastic_moe.cluster.facts.operations import ENDED
from elastic_moe.cluster.keys import authorization
from elastic_moe.cluster.lines import ESCAPES
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.messages.views import Readiness
from elastic_moe.deploy.launch.console import close_curtain, describe_error
from elastic_moe.deploy.launch.local_ray import (
    END_TIMEOUT_S,
    ServerProcesses,
    check_gpu,
    check_port,
    check_shared_memory,
    check_threads,
)
from elastic_moe.deploy.launch.run_directory import RunDirectory
from elastic_moe.deploy.launch.supervision import TRY_AGAIN, Phase
from elastic_moe.deploy.launch.supervisor import Report, supervised
from elastic_moe.deploy.text.tokenizer_process import TokenizerProcess
from elastic_moe.deploy.tools.form import check_parsers
from elastic_moe.model.native.segments import remove_stale
from elastic_moe.optimizer.core.solvers import missing

logger = logging.getLogger(__name__)

POLL_S = 0.25
"""Seconds between two questions whether the server is ready."""
DRAIN_ANSWER_S = 15.0
"""Seconds, beyond --shutdown-timeout, that the API may take to answer how many requests are left."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""It asks the server directly, whatever proxy the environment names."""
LONG_SILENCE_S = 15.0
"""Seconds without an answer of the API after which the user gets a line."""
NATIVE_OUTPUT = "main.err"
"""The file for what Ray's C++ prints."""
QUIET_S = 5.0
"""Without a terminal, seconds before the same kind of progress is printed again."""


class ServerFailed(EmoeError):
    """The server cannot start, or has ended by itself; the message says why."""


class StartFailed(ServerFailed):
    """Ray or Serve did not start. The reason may pass, as when the machine was too busy."""


class _Stop(BaseException):
    """A signal asked for an orderly end."""


def serve(config: ServeConfig, named: Callable[[str], str]) -> int:
    """Serve until a signal comes. Blocks; returns the exit code, 0 after an orderly end. Raises UserError.

    named: a ConfigError's message with the setting as the user gave it.
    """
    check_port(config.host, config.port)
    check_gpu(config)
    if config.address is None:
        check_shared_memory()
        check_threads(config.data_parallel_size * config.workers)
    remove_stale()
    directory = RunDirectory.create()

    def clean_up() -> None:
        directory.remove()
        remove_stale()

    return supervised(
        lambda report: _main(config, directory, report, named),
        local=config.address is None,
        stop_s=config.shutdown_timeout + 4 * END_TIMEOUT_S + DRAIN_ANSWER_S,
        clean_up=clean_up,
        last_words=lambda: _last_words(directory.path / NATIVE_OUTPUT),
    )


def _main(config: ServeConfig, directory: RunDirectory, report: Report, named: Callable[[str], str]) -> int:
    """The server's main process. Returns its exit code; the supervisor kills the processes that it leaves."""
    _keep_native_output(directory.path / NATIVE_OUTPUT)
    progress = _Progress(report.stage)
    try:
        return _serve(config, directory, report, progress)
    except ConfigError as error:
        code, text = 2, named(str(error))
    except UserError as error:
        code, text = 2, str(error)
    except StartFailed as error:
        report.failure(str(error))
        return TRY_AGAIN
    except EmoeError as error:
        code, text = 1, str(error)
    finally:
        progress.clear()
    print(f"emoe: error: {text}", file=sys.stderr, flush=True)
    return code


def _serve(config: ServeConfig, directory: RunDirectory, report: Report, progress: _Progress) -> int:
    signals = _Signals()
    signals.install()
    processes = ServerProcesses(config, directory, report.part)
    try:
        try:
            model_dir, model = _checked_model(config)
            _start(processes, signals, progress, model_dir, model)
            ready = _wait_until_ready(config, progress)
            report.phase(Phase.SERVING)
            progress.clear()
            if ready.resident < 1:
                print(ready.reason, file=sys.stderr, flush=True)
            print(f"serving {_name(config, model_dir)} on {_url(config)}", flush=True)
            _watch(config)
        except (_Stop, SystemExit):
            # Ray installs a handler of SIGTERM that raises SystemExit; it is in force until `install` is called again
            report.phase(Phase.STOPPING)
            progress.clear()
            print("stopping", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                processes.drain(config.shutdown_timeout)
            close_curtain()
    finally:
        report.phase(Phase.STOPPING)
        progress.clear()
        processes.stop()
    return 0


def _keep_native_output(path: Path) -> None:
    """Send what Ray's C++ writes to file descriptor 2 into a file, and keep standard error for Python's lines."""
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 2)
    os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _last_words(path: Path) -> str:
    """Why Ray ended the main process: the last error that its C++ has written, or else its last line."""
    with contextlib.suppress(OSError):
        text = ESCAPES.sub("", path.read_bytes()[-65536:].decode(errors="replace"))
        if errors := re.findall(r"^\[[^\]]* [CE] \d+ \d+\] (?:\(.*?\) )?\S+:\d+: +(.+)$", text, re.MULTILINE):
            return str(errors[-1])
        return next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return ""


def _start(
    processes: ServerProcesses, signals: _Signals, progress: _Progress, model_dir: str, model: ModelInfo
) -> None:
    """Start Ray and the application. Raises StartFailed, with a message of one line, for whatever Ray and Serve
    raise."""
    try:
        progress.show("starting Ray" if processes.local else "joining Ray")
        processes.start_ray()
        signals.install()
        progress.show("starting the API")
        processes.start_app(model_dir, model)
        signals.install()
    except EmoeError:
        raise
    except Exception as error:
        logger.warning("cannot start", exc_info=error)
        raise StartFailed(f"cannot start: {describe_error(error)}") from error


def _checked_model(config: ServeConfig) -> tuple[str, ModelInfo]:
    """The model's directory and description, checked before anything starts. Raises CheckpointError and ConfigError."""
    check_parsers(config)
    if config.address is None and (reason := missing(config.solver)):
        raise ConfigError(f"solver: {reason}")
    if config.model is None:
        from elastic_moe.deploy.launch.builtin import MODEL, MODEL_DIR, NOTICE

        print(NOTICE, file=sys.stderr, flush=True)
        model_dir, info = str(MODEL_DIR), MODEL
        if config.chat_template is not None:
            with TokenizerProcess(model_dir, config.chat_template) as process:
                process.wait()
    else:
        model_dir = os.path.abspath(os.path.expanduser(config.model))
        # the tokenizer is checked meanwhile
        with TokenizerProcess(model_dir, config.chat_template) as process:
            info = describe(model_dir)
            process.wait()
    check_limits(config, info)
    if config.address is None:
        check_groups(config, cores=len(os.sched_getaffinity(0)), free_bytes=psutil.virtual_memory().available)
    if config.calibration is not None and config.address is None:
        from elastic_moe.optimizer.constants import load_constants

        # a coordinator that starts again later goes on without the file, and logs that
        try:
            load_constants(Path(config.calibration))
        except ConfigError as error:
            raise ConfigError(f"calibration: {error}") from None
    return model_dir, info


class _Signals:
    """Raises _Stop in the main thread for the first SIGTERM of the supervisor. The supervisor counts the user's
    signals."""

    def __init__(self) -> None:
        self._seen = False

    def install(self) -> None:
        """Set the handlers. Call this again after Ray has started, since Ray sets its own."""
        signal.signal(signal.SIGTERM, self._handle)
        # a handler and not SIG_IGN, because child processes would inherit SIG_IGN
        signal.signal(signal.SIGINT, lambda *_: None)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self._seen:
            self._seen = True
            raise _Stop


def _wait_until_ready(config: ServeConfig, progress: _Progress) -> Readiness:
    while True:
        state = _readiness(config)
        if state is None:
            progress.show("starting the API")
        elif state.error is not None:
            raise ServerFailed(state.error)
        elif state.ready:
            return state
        else:
            progress.show(state.reason)
        time.sleep(POLL_S)


def _watch(config: ServeConfig) -> None:
    """Print a line for each recovery and scaling while the server runs. Raises ServerFailed where it cannot go on."""
    reported: defaultdict[int, set[str]] = defaultdict(set)
    silence = Silence(time.monotonic())
    while True:
        time.sleep(2.0)
        state = _readiness(config)
        if line := silence.news(answered=state is not None, now=time.monotonic()):
            print(line, file=sys.stderr, flush=True)
        if state is not None and state.error is not None:
            raise ServerFailed(state.error)
        for line in all_news(lambda path: _get(config, path), reported):
            print(line, file=sys.stderr, flush=True)


def all_news(get: Callable[[str], Any], reported: defaultdict[int, set[str]]) -> list[str]:
    """The `news` of every group. `get` returns the JSON at a path. Takes one question for each group, and one that is
    answered without the cluster: groups come and go, and the first number that there is none of ends them."""
    found: dict[int, list[str]] = {}
    for group in itertools.count():
        operations = get(f"/admin/operations?engine={group}")
        # a group whose coordinator does not answer now is no reason to stop
        if operations is None or (
            isinstance(operations, dict) and operations.get("error", {}).get("param") == "engine"
        ):
            break
        found[group] = news(operations, reported[group])
    named = len(found) > 1
    return [f"group {group}: {line}" if named else line for group, lines in found.items() for line in lines]


class Silence:
    """Reports once that the API does not answer, and once that it answers again."""

    def __init__(self, now: float) -> None:
        self._heard_at = now
        self._reported = False

    def news(self, *, answered: bool, now: float) -> str | None:
        """A line for the user, or None."""
        silent_s = now - self._heard_at
        if answered:
            self._heard_at = now
            was_reported, self._reported = self._reported, False
            return f"the API answers again, after {silent_s:.0f} s" if was_reported else None
        if self._reported or silent_s < LONG_SILENCE_S:
            return None
        self._reported = True
        return f"the API has not answered for {silent_s:.0f} s"


def news(operations: Any, reported: set[str]) -> list[str]:
    """A line for every recovery and scaling in GET /admin/operations that has ended and is not yet in `reported`.

    Their ids are added to `reported`.
    """
    lines: list[str] = []
    for operation in reversed(operations) if isinstance(operations, list) else ():
        name, phase = operation["operation_id"], operation["phase"]
        if operation["kind"] in ("recover", "scale") and phase in ENDED and name not in reported:
            reported.add(name)
            lines.append(f"{name} {phase}: {operation['error'] or operation['reason']}")
    return lines


def _readiness(config: ServeConfig) -> Readiness | None:
    """The answer of /ready, as a client gets it; None where nobody answers."""
    body = _get(config, "/ready")
    if not isinstance(body, dict) or "ready" not in body:
        return None
    return Readiness(
        ready=bool(body["ready"]),
        reason=str(body.get("reason")),
        error=body.get("error"),
        resident=float(body.get("resident", 1.0)),
    )


def _get(config: ServeConfig, path: str) -> Any:
    """The JSON of the answer, whatever its status; None where there is no answer, or no JSON."""
    try:
        request = urllib.request.Request(_url(config) + path, headers=authorization(config))
        with _DIRECT.open(request, timeout=5) as response:
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
    """Shows the progress of a start: on a terminal one line that is written over, elsewhere a line for each change."""

    def __init__(self, report: Callable[[str], None]) -> None:
        """`report` is called with each text that is shown."""
        self._report = report
        self._terminal = sys.stderr.isatty()
        self._last = ""
        self._said_at = 0.0

    def show(self, text: str) -> None:
        if text == self._last:
            return
        self._report(text)
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
