"""The log lines of every process: where they go, and their format.

On the machine of `emoe serve`, all processes append to one file, and `emoe serve` shows what is appended
(deploy/launch/console.py). On other machines, or if that file cannot be written, lines go to standard error, which Ray
writes to a file for each process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.lines import single_line

OURS = "elastic_moe"
"""The logger of this project, which gets the configured level. Other packages log warnings and errors only."""
MORE = "  | "
"""Prefix of the lines of a traceback. They follow the line of the error."""
IDS = ("request_id", "operation_id")
"""Fields of a JSON line that say what it is about. A call of the logger gives them as `extra`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    level: str = "info"
    json: bool = False
    file: str | None = None
    """Path of the log file. None: standard error."""
    group: int = 0
    """Number of the group that the process belongs to. Lines name it beside the process, except in group 0."""

    @classmethod
    def of(cls, config: ServeConfig, group: int = 0) -> LogSettings:
        return cls(level=config.log_level, json=config.log_format == "json", file=config.log_file, group=group)


def set_up(process: str, settings: LogSettings) -> None:
    """Log this process's lines, warnings and uncaught errors of threads as `settings` say."""
    process = f"{process}.{settings.group}" if settings.group else process
    handler = _handler(settings)
    handler.setFormatter((JsonFormatter if settings.json else TextFormatter)(process))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(OURS).setLevel(settings.level.upper())
    logging.captureWarnings(True)
    threading.excepthook = _thread_failed
    # Where a record cannot be written, as on a full disk, logging would report that on standard error. Serve logs what
    # an API writes there, to the same disk: one record then took minutes of the event loop
    logging.raiseExceptions = False
    serve = logging.getLogger("ray.serve")
    if not serve.propagate:
        # Ray Serve logs to a file of its own, where a user would not look for a traceback
        serve.addFilter(_Copy(handler))


def as_before() -> Callable[[], None]:
    """Returns a function that restores the logging of now, after a later `set_up`."""
    handlers, level, hook = logging.root.handlers[:], logging.root.level, threading.excepthook
    own, reports = logging.getLogger(OURS).level, logging.raiseExceptions

    def undo() -> None:
        logging.captureWarnings(False)
        logging.raiseExceptions = reports
        threading.excepthook = hook
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        logging.getLogger(OURS).setLevel(own)

    return undo


def log_file() -> str | None:
    """Path of the file that this process logs to; None if it logs to standard error."""
    return next((handler.path for handler in logging.root.handlers if isinstance(handler, FileLines)), None)


def _handler(settings: LogSettings) -> logging.Handler:
    # Serve replaces sys.stderr by a logger with a buffer
    plain = logging.StreamHandler(sys.__stderr__)
    if settings.file is None:
        return plain
    lines = FileLines(settings.file)
    return lines if lines.usable() else plain


class _Copy(logging.Filter):
    """Passes errors to another handler. It is a filter, because Serve removes handlers when it is configured again."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            self._handler.handle(record)
        return True


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is not None and not isinstance(failure.exc_value, SystemExit):
        name = failure.thread.name if failure.thread else "a thread"
        logging.getLogger(__name__).critical("%s failed", name, exc_info=failure.exc_value)


class FileLines(logging.Handler):
    """Appends records to a file that several processes share. Each record is one system call, so that none is cut."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self._file = -1

    def usable(self) -> bool:
        """Whether the file can be written. The first record creates it, so that a failed start leaves no empty file."""
        return os.access(self.path if os.path.exists(self.path) else os.path.dirname(self.path), os.W_OK)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = self.format(record).encode("utf-8", "backslashreplace") + b"\n"
            if self._moved():
                self._reopen()
            os.write(self._file, data)
        except (OSError, ValueError, TypeError):
            self.handleError(record)

    def _moved(self) -> bool:
        """Whether the file was renamed, as `emoe serve` does with a long one."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except OSError:
            return True

    def _reopen(self) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self._file >= 0:
            os.close(self._file)
        self._file = file

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._file)
        super().close()


class TextFormatter(logging.Formatter):
    """`TIME LEVEL PROCESS[PID] LOGGER: MESSAGE: ERROR` in one line, followed by the lines of a traceback."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = f"{process}[{os.getpid()}]"

    def format(self, record: logging.LogRecord) -> str:
        head = f"{_time(record)} {record.levelname} {self._process} {record.name}: {_message(record)}"
        return "\n".join([head, *(MORE + line for line in _traceback(record).splitlines())])


class JsonFormatter(logging.Formatter):
    """One JSON object in one line, with the IDS that the line is about."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "process": self._process,
            "pid": os.getpid(),
            "logger": record.name,
            "message": _message(record),
        }
        for name in IDS:
            if name in record.__dict__:
                fields[name] = str(record.__dict__[name])
        if more := _traceback(record):
            fields["traceback"] = more
        return json.dumps(fields)


def _time(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _message(record: logging.LogRecord) -> str:
    text = single_line(record.getMessage())
    error = record.exc_info[1] if record.exc_info else None
    return text if error is None else f"{text}: {type(error).__name__}: {single_line(str(error))}"


def _traceback(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    return "".join(traceback.format_exception(record.exc_info[1])).rstrip()


def log_directory(state_home: str | None, fallback: Path) -> Path:
    """The directory for log files, created if it is missing.

    It is `elastic-moe` under `state_home` ($XDG_STATE_HOME), by default under ~/.local/state, or else `fallback`.
    Raises PermissionError if none of them can be written.
    """
    for choice in (_state_directory(state_home), fallback):
        if choice is None:
            continue
        with contextlib.suppress(OSError):
            choice.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(choice, os.W_OK | os.X_OK):
                return choice
    raise PermissionError(f"log files: cannot write to {_state_directory(state_home)} or to {fallback}")


def _state_directory(state_home: str | None) -> Path | None:
    try:
        return (Path(state_home) if state_home else Path.home() / ".local" / "state") / "elastic-moe"
    except RuntimeError:  # the user has no home directory
        return None
