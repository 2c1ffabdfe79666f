"""The log file of a server, and the lines of it that `emoe serve` shows while it runs.

Every warning and error of every process appears on standard error at once, as one line with the name of the log file.
The tracebacks and all other lines are in that file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from elastic_moe.actors.logs import MORE, LogSettings, as_before, log_directory, log_file, set_up
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError, EmoeError
from elastic_moe.cluster.lines import ending, single_line

LOOK_S = 0.2
"""Seconds between two looks at the file."""
LONGEST_BYTES = 64 * 2**20
"""Size above which the file is renamed to FILE.1 and a new one is begun."""
KEPT_FILES = 10
"""Number of servers whose log files are kept."""
SHOWN = ("WARNING", "ERROR", "CRITICAL")
HEAD = re.compile(r"\S+ (?P<level>[A-Z]+) (?P<process>.+?)\[\d+\] \S+: (?P<message>.*)")
LAST = "the processes are ended"
"""The last line that is shown: later lines come from processes that have lost their peers."""
LONGEST_LINE = 500
"""Most characters of a message that are shown."""
LONGEST_ERROR = 600
"""Most characters of a Ray error that are shown."""


@contextlib.contextmanager
def logged(config: ServeConfig, environ: Mapping[str, str]) -> Iterator[ServeConfig]:
    """Yield `config` with the name of a log file, and show the lines that processes write to it meanwhile.

    The first process that writes makes the file.

    Raises ConfigError where `config.log_file` cannot be written.
    """
    file = _named_file(config.log_file) if config.log_file else _new_file(config, environ)
    config = dataclasses.replace(config, log_file=str(file))
    undo = as_before()
    set_up("emoe", LogSettings.of(config))
    follower = Follower(file, as_json=config.log_format == "json")
    follower.start()
    try:
        yield config
    finally:
        follower.end()
        undo()


def close_curtain() -> None:
    """Stop showing lines, because the processes are being ended. Any process of the server may call this."""
    logger = logging.getLogger(__name__)
    # it passes by the level that the user has set, because it is meant for the follower
    logger.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, LAST, (), None))


def keep_ray_lines(data: Any, ignore_prefix: bool = False) -> None:
    """Write what Ray brings from other processes into the log file. It replaces Ray's `print_to_stdstream`.

    Ray brings log lines of processes on other nodes, which cannot write to this file, and its own paragraphs about
    processes that died.
    """
    file = log_file()
    if file is None:
        return
    lines = [str(line) for line in data.get("lines", ())]
    whole = [
        line if HEAD.fullmatch(line) or line.startswith(("{", MORE)) else MORE + single_line(line) for line in lines
    ]
    with contextlib.suppress(OSError), open(file, "ab") as sink:
        sink.write("".join(line + "\n" for line in whole).encode("utf-8", "backslashreplace"))


def describe_error(error: BaseException) -> str:
    """An error of Ray's in one line: the end of its text, which names the cause, and the name of the log file."""
    text = ending(single_line(str(error)) or type(error).__name__, LONGEST_ERROR)
    file = log_file()
    return f"{text} (the whole error is in {file})" if file else text


def shown(line: str, file: Path, *, as_json: bool) -> str | None:
    """The text that standard error gets for a line of the log; None where it gets nothing."""
    if as_json:
        try:
            record = json.loads(line)
        except ValueError:
            return None
        return json.dumps({**record, "log_file": str(file)}) if record.get("level") in SHOWN else None
    found = HEAD.fullmatch(line)
    if line.startswith(MORE) or found is None or found["level"] not in SHOWN:
        return None
    message = found["message"]
    message = message if len(message) <= LONGEST_LINE else message[:LONGEST_LINE] + " ..."
    return f"{found['level'].lower()}: {found['process']}: {message} ({file})"


def _named_file(name: str) -> Path:
    file = Path(name).expanduser().absolute()
    try:
        with file.open("ab"):
            return file
    except OSError as error:
        raise ConfigError(f"log_file: {file}: {error.strerror}") from None


def _new_file(config: ServeConfig, environ: Mapping[str, str]) -> Path:
    """Choose a name for this server's log, and delete the oldest logs of other servers.

    Raises EmoeError where no directory can be written.
    """
    try:
        directory = log_directory(environ.get("XDG_STATE_HOME"), Path(tempfile.gettempdir()) / f"emoe-{os.getuid()}")
    except OSError as error:
        raise EmoeError(f"{error}; name a file with --log-file") from None
    old = sorted(directory.glob("serve-*.log"), key=_changed_at)
    for file in old[: max(0, len(old) - KEPT_FILES + 1)]:
        for part in (file, _aside(file)):
            part.unlink(missing_ok=True)
    return directory / f"serve-{time.strftime('%Y%m%d-%H%M%S')}-{config.port}-{os.getpid()}.log"


def _changed_at(file: Path) -> float:
    """When a file was changed; 0 if another server, which starts too, has deleted it meanwhile."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _aside(file: Path) -> Path:
    return file.with_name(file.name + ".1")


class Follower:
    """A thread that shows the lines which processes append to the log file."""

    def __init__(self, file: Path, *, as_json: bool, longest_bytes: int = LONGEST_BYTES) -> None:
        self._file = file
        self._as_json = as_json
        self._longest_bytes = longest_bytes
        self._read_bytes = file.stat().st_size if file.exists() else 0
        self._partial = b""
        self._closed = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Show the lines that are left, and end the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.look()
        self.look()

    def look(self) -> None:
        self._show_new(self._file)
        if self._read_bytes > self._longest_bytes:
            with contextlib.suppress(OSError):
                os.replace(self._file, _aside(self._file))
                # lines that came before the rename
                self._show_new(_aside(self._file))
            self._read_bytes = 0

    def _show_new(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._read_bytes:
                    # somebody has emptied the file, or begun another
                    self._read_bytes = 0
                file.seek(self._read_bytes)
                data = file.read()
        except OSError:
            return
        self._read_bytes += len(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            if LAST.encode() in line and __name__.encode() in line:
                self._closed = True
            if self._closed:
                return
            text = shown(line.decode("utf-8", "replace"), self._file, as_json=self._as_json)
            if text is not None:
                _show(text)


def _show(text: str) -> None:
    # a line of progress may stand there, and is written over
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    with contextlib.suppress(OSError, ValueError):
        print(f"{clear}{text}", file=sys.stderr, flush=True)
