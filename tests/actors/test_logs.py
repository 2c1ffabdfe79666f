"""Log lines of several processes in one file."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_moe.actors.logs import FileLines, LogSettings, TextFormatter, as_before, log_directory, log_file, set_up
from tests.paths import ROOT


@pytest.fixture
def untouched() -> Iterator[None]:
    """Puts back what `set_up` changes in this process."""
    undo = as_before()
    yield
    undo()


def fail() -> None:
    raise ValueError("two\nlines \x1b[31mred")


def log_everything() -> None:
    logging.getLogger("elastic_moe.deploy.x").info("an event")
    logging.getLogger("urllib3").info("of no interest")
    try:
        fail()
    except ValueError:
        logging.getLogger("elastic_moe.actors.y").exception("it failed\nbadly")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", stacklevel=1)
    thread = threading.Thread(target=fail, name="steps")
    thread.start()
    thread.join()


def test_lines_name_the_group_beside_the_process(untouched: None, tmp_path: Path) -> None:
    file = tmp_path / "log"
    set_up("w0", LogSettings(file=str(file), group=2))
    logging.getLogger("elastic_moe.x").warning("an event")
    assert re.fullmatch(r"\S+Z WARNING w0\.2\[\d+\] elastic_moe.x: an event\n", file.read_text())


def test_records_in_text(untouched: None, tmp_path: Path) -> None:
    file = tmp_path / "log"
    set_up("w0", LogSettings(file=str(file)))
    assert log_file() == str(file)
    assert not file.exists()
    log_everything()
    heads = [line for line in file.read_text().splitlines() if not line.startswith("  | ")]
    wanted = [
        r"\S+Z INFO w0\[\d+\] elastic_moe.deploy.x: an event",
        r"\S+Z ERROR w0\[\d+\] elastic_moe.actors.y: it failed badly: ValueError: two lines red",
        r"\S+Z WARNING w0\[\d+\] py.warnings: .* UserWarning: old.*",
        r"\S+Z CRITICAL w0\[\d+\] elastic_moe.actors.logs: steps failed: ValueError: two lines red",
    ]
    assert len(heads) == len(wanted)
    for head, pattern in zip(heads, wanted, strict=True):
        assert re.fullmatch(pattern, head), head
    assert file.read_text().count('  |     raise ValueError("two') == 2
    assert file.stat().st_mode & 0o077 == 0


def test_records_in_json(untouched: None, tmp_path: Path) -> None:
    file = tmp_path / "log"
    set_up("api", LogSettings(file=str(file), json=True, level="warning"))
    log_everything()
    logging.getLogger("elastic_moe.deploy.x").error("it ended", extra={"request_id": "cmpl-1-0", "other": 1})
    *records, about = [json.loads(line) for line in file.read_text().splitlines()]
    assert (about["request_id"], about["message"]) == ("cmpl-1-0", "it ended")
    assert not about.keys() & {"other", "operation_id"}
    assert [record["level"] for record in records] == ["ERROR", "WARNING", "CRITICAL"]
    assert {record["process"] for record in records} == {"api"}
    assert "in fail" in records[0]["traceback"]


def test_serves_own_tracebacks_are_copied(untouched: None, tmp_path: Path) -> None:
    file = tmp_path / "log"
    serve = logging.getLogger("ray.serve")
    propagate, filters = serve.propagate, serve.filters[:]
    serve.propagate = False
    try:
        set_up("api", LogSettings(file=str(file)))
        serve.handlers.clear()
        serve.error("a request failed")
    finally:
        serve.propagate, serve.filters[:] = propagate, filters
    assert "ERROR api" in file.read_text()
    assert "a request failed" in file.read_text()


def test_without_a_file(untouched: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for settings in (LogSettings(), LogSettings(file="/no/such/directory/log")):
        set_up("engine", settings)
        logging.getLogger("elastic_moe.deploy.x").warning("to standard error")
        assert log_file() is None
        assert "to standard error" in capfd.readouterr().err


def test_a_log_file_that_was_renamed_is_opened_anew(tmp_path: Path) -> None:
    file = tmp_path / "log"
    handler = FileLines(str(file))
    handler.setFormatter(TextFormatter("w0"))
    for name in ("first", "second"):
        handler.handle(logging.LogRecord("n", logging.INFO, "p", 1, name, (), None))
        file.rename(tmp_path / f"{name}.log")
    handler.close()
    assert "first" in (tmp_path / "first.log").read_text()
    assert "second" in (tmp_path / "second.log").read_text()


WRITER = """
import logging, sys
from elastic_moe.actors.logs import LogSettings, set_up
set_up(sys.argv[1], LogSettings(file=sys.argv[2]))
for number in range(200):
    logging.getLogger("elastic_moe.deploy").info("%d %s", number, "x" * 20_000)
"""


def test_lines_of_several_processes_are_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "log"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name, str(file)], cwd=ROOT)
               for name in ("a", "b")]  # fmt: skip
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = file.read_text().splitlines()
    assert len(lines) == 400
    assert all(re.fullmatch(r"\S+ INFO [ab]\[\d+\] elastic_moe.deploy: \d+ x{20000}", line) for line in lines)


def test_where_log_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fallback = tmp_path / "fallback"
    assert log_directory(str(tmp_path / "state"), fallback) == tmp_path / "state" / "elastic-moe"
    assert log_directory(None, fallback) == tmp_path / "home" / ".local" / "state" / "elastic-moe"
    # a home that is no directory, as that of some service accounts
    monkeypatch.setenv("HOME", "/dev/null")
    assert log_directory(None, fallback) == fallback
    with pytest.raises(PermissionError):
        log_directory(None, Path("/dev/null/x"))


FULL = """
import logging, os, sys
from ray.serve._private import logging_utils
from ray.serve._private.common import ServeComponentType
from ray.serve.schema import LoggingConfig
from elastic_moe.actors.logs import LogSettings, set_up
api = {"component_name": "api", "component_id": "1", "component_type": ServeComponentType.REPLICA}
file = logging_utils.get_component_file_name(**api, suffix=".log")
os.symlink("/dev/full", os.path.join(sys.argv[1], file))
logging_utils.configure_component_logger(
    **api, logging_config=LoggingConfig(logs_dir=sys.argv[1]), max_bytes=1000, backup_count=1
)
set_up("api", LogSettings())
logging.getLogger("ray.serve").info("a request")
logging.getLogger("ray.serve").error("an error")
os._exit(7)
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no file that is always full")
def test_an_api_goes_on_where_a_record_of_serve_cannot_be_written(tmp_path: Path) -> None:
    # Serve logs what an API prints, a report of logging included
    environment = os.environ | {"RAY_SERVE_LOG_TO_STDERR": "0"}
    api = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert api.returncode == 7, api.stderr
    assert "an error" in api.stderr
