"""The main process of a server without Ray: what it returns and tells its supervisor."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError, UserError
from elastic_moe.deploy.cli import serve as cli_serve
from elastic_moe.deploy.cli.serve import ServerFailed, Silence, StartFailed, all_news
from elastic_moe.deploy.launch import local_ray
from elastic_moe.deploy.launch.run_directory import RunDirectory
from elastic_moe.deploy.launch.supervision import TRY_AGAIN
from elastic_moe.optimizer.core import solvers


class Told:
    """A supervisor's ear."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.stages: list[str] = []

    def failure(self, reason: str) -> None:
        self.failures.append(reason)

    def stage(self, text: str) -> None:
        self.stages.append(text)


def run(error: Exception, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Told]:
    def fail(*_: Any) -> int:
        raise error

    monkeypatch.setattr(cli_serve, "_serve", fail)
    monkeypatch.setattr(cli_serve, "_keep_native_output", lambda _: None)
    told: Any = Told()
    return cli_serve._main(ServeConfig(), RunDirectory(path=Path("/"), lock=-1), told, lambda text: f"--{text}"), told


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [(ConfigError("workers: no"), 2, "--workers: no"), (ServerFailed("it went down"), 1, "it went down")],
)
def test_errors_are_printed_for_the_user(
    error: Exception, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(error, monkeypatch)[0] == code
    assert capsys.readouterr().err == f"emoe: error: {says}\n"


def test_a_calibration_file_that_a_user_names_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"/no/such\.json: No such file"):
        cli_serve._checked_model(ServeConfig(calibration="/no/such.json"))


def test_a_solver_that_is_not_installed_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "cbc_binary", lambda: None)
    with pytest.raises(ConfigError, match=r"solver: the solver cbc was found neither .* pip install"):
        cli_serve._checked_model(ServeConfig(solver="cbc"))
    # a cluster's coordinator runs on another machine
    assert cli_serve._checked_model(ServeConfig(solver="cbc", address="auto"))


def test_a_ray_that_nobody_started_is_not_waited_for() -> None:
    """Ray tries for a minute."""
    with pytest.raises(UserError, match=r"--address: cannot join 127\.0\.0\.1:1: Connection refused"):
        local_ray.check_answers("127.0.0.1:1")
    for left_to_ray in ("auto", "local", "ray://head:10001", "head"):
        local_ray.check_answers(left_to_ray)


def test_a_failed_start_is_reported_to_the_supervisor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which may try again, and then there is no error."""
    code, told = run(StartFailed("cannot start: GCS did not answer"), monkeypatch)
    assert code == TRY_AGAIN
    assert told.failures == ["cannot start: GCS did not answer"]
    assert capsys.readouterr().err == ""


def test_rays_stacks_go_to_a_file_and_our_lines_do_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = os.dup(2), os.dup(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", os.fdopen(os.dup(2), "w"))
        with cli_serve.sys.stderr:
            cli_serve._keep_native_output(tmp_path / "main.err")
        try:
            os.write(2, b"*** SIGABRT ***\n")
            print("stopping", file=cli_serve.sys.stderr, flush=True)
            cli_serve.sys.stderr.close()
        finally:
            for saved, descriptor in zip(kept, (2, 0), strict=True):
                os.dup2(saved, descriptor)
                os.close(saved)
    assert capfd.readouterr().err == "stopping\n"
    assert (tmp_path / "main.err").read_text() == "*** SIGABRT ***\n"


def test_a_silent_api_is_reported_once() -> None:
    silence = Silence(now=100)
    assert silence.news(answered=False, now=110) is None
    assert silence.news(answered=False, now=120) == "the API has not answered for 20 s"
    assert silence.news(answered=False, now=130) is None
    assert silence.news(answered=True, now=140) == "the API answers again, after 40 s"
    assert silence.news(answered=True, now=142) is None


def test_the_reason_of_a_crash_is_found_above_its_stack(tmp_path: Path) -> None:
    path = tmp_path / "main.err"
    assert cli_serve._last_words(path) == ""
    path.write_text(
        "[2026-11-26 00:44:23,101 E 12 34] gcs.cc:1: first\n"
        "\x1b[31m[2026-11-26 00:44:24,101 C 12 34] (emoe) gcs.cc:77: Failed to connect to GCS within 60 s\x1b[m\n"
        "*** StackTrace Information ***\n"
        "/lib/ray.so(+0x1) [0x7f]\n"
    )
    assert cli_serve._last_words(path) == "Failed to connect to GCS within 60 s"
    path.write_text("one\n\nSegmentation fault\n")
    assert cli_serve._last_words(path) == "Segmentation fault"


def test_groups_are_followed_without_a_question_to_all_of_them() -> None:
    """/admin/engines, which asks every coordinator and engine, was asked every two seconds."""
    ended = {"operation_id": "recover-2", "kind": "recover", "phase": "completed", "reason": "w0 lost", "error": None}
    none: dict[str, Any] = {"error": {"param": "engine", "code": None}}
    asked: list[str] = []
    groups: list[Any] = [[ended]]

    def get(path: str) -> Any:
        asked.append(path)
        number = int(path.partition("=")[2])
        return groups[number] if number < len(groups) else none

    reported: defaultdict[int, set[str]] = defaultdict(set)
    assert all_news(get, reported) == ["recover-2 completed: w0 lost"]
    assert asked == ["/admin/operations?engine=0", "/admin/operations?engine=1"]
    # one is added, and the coordinator of the first one does not answer for a moment
    groups[:] = [{"error": {"param": None, "code": "not_ready"}}, [ended]]
    assert all_news(get, reported) == ["group 1: recover-2 completed: w0 lost"]
    assert all_news(lambda path: None, reported) == []
