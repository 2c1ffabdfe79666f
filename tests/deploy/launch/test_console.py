"""What `emoe serve` shows of its processes' log."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from elastic_moe.actors.logs import FileLines, TextFormatter
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.deploy.launch.console import (
    KEPT_FILES,
    Follower,
    close_curtain,
    describe_error,
    keep_ray_lines,
    logged,
    shown,
)

LOG = Path("/logs/x.log")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "2026-01-01T00:00:00.000Z WARNING w0[12] elastic_moe.model.worker.data_plane: hot",
            "warning: w0: hot (/logs/x.log)",
        ),
        ("2026-01-01T00:00:00.000Z CRITICAL engine[1] a: b: c", "critical: engine: b: c (/logs/x.log)"),
        ("2026-01-01T00:00:00.000Z INFO w0[12] elastic_moe.model.worker.data_plane: warm", None),
        ("  | 2026-01-01T00:00:00.000Z ERROR w0[12] a: written by a client into a traceback", None),
        ("Traceback (most recent call last):", None),
        ("", None),
    ],
)
def test_lines_that_are_shown(line: str, text: str | None) -> None:
    assert shown(line, LOG, as_json=False) == text


def test_json_is_shown_whole() -> None:
    record = {"level": "ERROR", "message": "m", "traceback": "a\nb"}
    text = shown(json.dumps(record), LOG, as_json=True)
    assert text is not None
    assert json.loads(text) == record | {"log_file": "/logs/x.log"}
    assert "\n" not in text
    assert shown(json.dumps({"level": "INFO"}), LOG, as_json=True) is None
    assert shown("no JSON", LOG, as_json=True) is None


def test_warnings_of_other_processes_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "log"
    other = FileLines(str(file))
    other.setFormatter(TextFormatter("w1"))
    with logged(ServeConfig(log_file=str(file)), {}) as config:
        assert config.log_file == str(file)
        other.handle(logging.LogRecord("elastic_moe.model.worker.data_plane", logging.WARNING, "p", 1, "hot", (), None))
        other.handle(logging.LogRecord("elastic_moe.model.worker.data_plane", logging.INFO, "p", 1, "warm", (), None))
        logging.getLogger("deploy.x").error("here")
        assert str(file) in describe_error(RuntimeError("\x1b[31mno " + "x " * 1000 + "the cause"))
        assert "the cause (" in describe_error(RuntimeError("\x1b[31mno " + "x " * 1000 + "the cause"))
    other.close()
    assert capsys.readouterr().err.splitlines() == [f"warning: w1: hot ({file})", f"error: emoe: here ({file})"]


def test_lines_that_ray_brings_from_other_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "log"
    keep_ray_lines({"lines": ["nowhere to put it"]})
    with logged(ServeConfig(log_file=str(file)), {}):
        head = "2026-01-01T00:00:00.000Z WARNING w3[7] elastic_moe.model.worker.data_plane: hot"
        keep_ray_lines({"lines": [head, "  | Traceback", "\x1b[36ma paragraph"], "pid": 7}, ignore_prefix=False)
    assert file.read_text().splitlines() == [head, "  | Traceback", "  | a paragraph"]
    assert capsys.readouterr().err.splitlines() == [f"warning: w3: hot ({file})"]


def test_the_end_of_processes_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "log"
    with logged(ServeConfig(log_file=str(file), log_level="error"), {}):
        logging.getLogger("deploy.x").error("before")
        close_curtain()
        logging.getLogger("deploy.x").error("after")
    assert capsys.readouterr().err.splitlines() == [f"error: emoe: before ({file})"]
    assert "after" in file.read_text()


def test_a_file_for_each_server(tmp_path: Path) -> None:
    directory = tmp_path / "elastic-moe"
    directory.mkdir()
    # another server deletes a file after this one has listed it
    (directory / "serve-gone.log").symlink_to("nowhere")
    for number in range(KEPT_FILES + 3):
        old = directory / f"serve-{number}.log"
        old.touch()
        os.utime(old, (number, number))
    with logged(ServeConfig(port=8123), {"XDG_STATE_HOME": str(tmp_path)}) as config:
        assert config.log_file is not None
        assert Path(config.log_file).parent == directory
        assert "8123" in config.log_file
        # a server that does not come up leaves none
        assert not Path(config.log_file).exists()
    assert len(list(directory.iterdir())) == KEPT_FILES - 1
    assert (directory / f"serve-{KEPT_FILES + 2}.log").exists()


def test_a_file_that_cannot_be_written() -> None:
    with (
        pytest.raises(ConfigError, match="log_file: /no/such/log: No such file"),
        logged(ServeConfig(log_file="/no/such/log"), {}),
    ):
        pass


def test_a_long_log_is_put_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "log"
    handler = FileLines(str(file))
    handler.setFormatter(TextFormatter("w0"))
    follower = Follower(file, as_json=False, longest_bytes=100)
    for number in range(5):
        handler.handle(logging.LogRecord("n", logging.WARNING, "p", 1, f"{number} {'x' * 100}", (), None))
        follower.look()
    handler.close()
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["0", "1", "2", "3", "4"]
    assert not file.exists()
    assert "4 x" in (tmp_path / "log.1").read_text()
