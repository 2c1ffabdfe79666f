"""A fork is what a new process would be, and a launcher starts Python itself where there is none."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_moe.actors.forkserver import launcher
from elastic_moe.actors.forkserver.launcher import Refused
from elastic_moe.actors.forkserver.origin import origin
from elastic_moe.actors.forkserver.request import Answer, Stage, peer_of, receive_request, send
from elastic_moe.actors.forkserver.stages import MODEL, command_of_models
from elastic_moe.cluster import interpreter
from tests.actors.forkserver.harness import SCRIPT, Node, gone, node, read, wait


@pytest.fixture
def a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    with node(tmp_path) as made:
        # `hand_over` in this process asks as a worker of that node
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


def test_a_fork_is_as_a_new_process(a_node: Node, tmp_path: Path) -> None:
    server = a_node.serve()
    report = tmp_path / "report"
    seen = []
    for start in (a_node.plain, a_node.launch):
        process = start(report, "--flag", "fail")
        assert process.stdout is not None
        seen.append((*read(report), process.stdout.read(), process.wait()))
        report.unlink()
    (plain, own, said, code), (fork, fork_own, fork_said, fork_code) = seen
    assert origin(fork["environment"]) == (f"forked from process {server.pid}", True)
    del fork["environment"]["EMOE_PROCESS_ORIGIN"]
    assert fork == plain
    assert fork["argv"][0] == SCRIPT
    assert fork["path"][0] == str(Path(SCRIPT).parent)
    assert sorted(said.splitlines()) == sorted(fork_said.splitlines()) == ["to standard error", "to standard output"]
    assert own["parent"] == os.getpid()
    assert fork_own["parent"] == server.pid
    # the launcher's group, as Ray ends the group of a worker with it
    assert fork_own["group"] not in (os.getpgid(0), os.getpgid(server.pid), fork_own["pid"])
    assert (code, fork_code) == (7, 0)
    wait(lambda: gone(fork_own["pid"]))


def test_forks_draw_other_random_numbers(a_node: Node, tmp_path: Path) -> None:
    a_node.serve()
    pids = [a_node.hand_over(tmp_path / name) for name in "ab"]
    drawn = [read(tmp_path / name)[1] for name in "ab"]
    assert [own["pid"] for own in drawn] == pids
    assert not set(drawn[0]["random"]) & set(drawn[1]["random"])


def test_forks_outlive_their_server(a_node: Node, tmp_path: Path) -> None:
    server = a_node.serve()
    pid = a_node.hand_over(tmp_path / "report", "wait")
    server.kill()
    server.wait()
    assert not gone(pid)
    # what is left of it is in nobody's way
    a_node.serve()
    other = a_node.hand_over(tmp_path / "other", "wait")
    assert read(tmp_path / "other")[1]["pid"] == other
    for left in (pid, other):
        os.kill(left, signal.SIGKILL)


def test_a_server_has_the_environment_that_requests_tell(a_node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """readline, which pytest imports where it runs tests in its own process, sets COLUMNS and LINES past Python."""
    ctypes.CDLL(None).setenv(b"EMOE_SET_BY_C", b"1", 1)
    try:
        seen = a_node.directory / "environment"
        script = f"import json, os; open({str(seen)!r}, 'w').write(json.dumps(dict(os.environ)))"
        monkeypatch.setattr(interpreter, "command_of", lambda *_: [sys.executable, "-c", script])
        with socket.socket(socket.AF_UNIX) as listener:
            launcher._spawn([(listener, str(a_node.path), MODEL)])
        assert json.loads(seen.read_text()).keys() - {"LC_CTYPE"} == os.environ.keys() - {"LC_CTYPE"}
    finally:
        ctypes.CDLL(None).unsetenv(b"EMOE_SET_BY_C")


@pytest.mark.parametrize("ends", ["its raylet has ended", "it has no forks"])
def test_a_server_ends_when(a_node: Node, tmp_path: Path, ends: str) -> None:
    idle = ends == "it has no forks"
    server = a_node.serve(idle_s=0.2 if idle else 60)
    pid = a_node.hand_over(tmp_path / "report", "wait")
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(1)
    if idle:
        os.kill(pid, signal.SIGKILL)
    else:
        # a zombie, as long as nobody asks for its exit code
        a_node.raylet.kill()
    assert server.wait(10) == 0
    assert not a_node.path.exists()
    if not idle:
        os.kill(pid, signal.SIGKILL)


def test_a_server_reaps_its_forks(a_node: Node, tmp_path: Path) -> None:
    server = a_node.serve()
    pid = a_node.hand_over(tmp_path / "report", "wait")
    os.kill(pid, signal.SIGKILL)
    wait(lambda: not psutil.pid_exists(pid))
    assert not psutil.Process(server.pid).children()


def test_a_server_that_hangs_is_killed_and_no_fork_runs(
    a_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "ANSWER_S", 0.3)
    server = a_node.serve()
    server.send_signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        a_node.hand_over(tmp_path / "report")
    assert server.wait(10) == -signal.SIGKILL
    assert not (tmp_path / "report").exists()


def test_no_fork_runs_for_a_launcher_that_waits_no_longer(
    a_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts Python itself then, and Ray must not have the same worker twice."""
    server = a_node.serve()
    # as if it still imported: then it is not killed
    monkeypatch.setattr(launcher, "is_server", lambda _: False)
    server.send_signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        a_node.hand_over(tmp_path / "report", within_s=0.3)
    server.send_signal(signal.SIGCONT)
    other = a_node.hand_over(tmp_path / "other")
    wait(lambda: gone(other) and not psutil.Process(server.pid).children())
    assert not (tmp_path / "report").exists()


def test_a_launcher_that_holds_its_request_back_keeps_no_other_waiting(a_node: Node, tmp_path: Path) -> None:
    a_node.serve()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(str(a_node.path))
        a_node.hand_over(tmp_path / "report")
        read(tmp_path / "report")


def test_another_environment_is_refused(a_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries have read it when they were imported."""
    a_node.serve()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    with pytest.raises(Refused, match="environment differs in MALLOC_ARENA_MAX"):
        a_node.hand_over(tmp_path / "report")


def test_workers_of_several_jobs_are_forks_of_one_server(
    a_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts a detached actor's worker for no job. The variable is read when a worker begins, and by no import."""
    server = a_node.serve()
    monkeypatch.setenv("RAY_JOB_ID", "ffffffff")
    a_node.hand_over(tmp_path / "report")
    found, own = read(tmp_path / "report")
    assert own["parent"] == server.pid
    assert found["environment"]["RAY_JOB_ID"] == "ffffffff"


def test_what_a_fork_cannot_take_over_is_refused(a_node: Node, tmp_path: Path) -> None:
    a_node.serve()
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with pytest.raises(Refused, match="process differs in signals"):
            a_node.hand_over(tmp_path / "report")
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_users_server_gets_no_request(a_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would get the keys that are in the environment."""
    received: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(a_node.path))
        listener.listen()
        assert peer_of_own(listener, a_node.path) == (os.getpid(), os.geteuid())
        monkeypatch.setattr(launcher, "peer_of", lambda _: (1, os.geteuid() + 1))
        with pytest.raises(Refused, match="another user's"):
            a_node.hand_over(tmp_path / "report")
        connection, _ = listener.accept()
        with connection:
            received.append(connection.recv(1))
    assert received == [b""]


def peer_of_own(listener: socket.socket, path: Path) -> tuple[int, int]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        accepted, _ = listener.accept()
        with accepted:
            return peer_of(connection)


@pytest.mark.parametrize(
    "answers", [b"", b"GET / HTTP/1.1\r\n\r\n" * 10, b"\xff\xff\xff\x7f", b"\x02\0\0\0{}", b"\x03\0\0\0[1]"]
)
def test_a_server_that_answers_nonsense(a_node: Node, tmp_path: Path, answers: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(a_node.path))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                receive_request(connection)
                connection.sendall(answers)

        answering = threading.Thread(target=answer)
        answering.start()
        with pytest.raises((OSError, ValueError)):
            a_node.hand_over(tmp_path / "report", within_s=5)
        answering.join()


def test_a_request_of_nonsense_ends_its_fork_alone(a_node: Node, tmp_path: Path) -> None:
    server = a_node.serve()
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\0"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(a_node.path))
            connection.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(a_node.path))
        # an answer is no request
        send(connection, Answer(1, ""), [0, 1, 2, 0])
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    a_node.hand_over(tmp_path / "report")
    assert server.poll() is None


@pytest.mark.parametrize("fault", ["a file is in the way", "no directory", "a name too long", "locked", "no raylet"])
def test_a_launcher_starts_python_where_no_server_can_be(a_node: Node, tmp_path: Path, fault: str) -> None:
    environment = {}
    match fault:
        case "a file is in the way":
            a_node.path.mkdir()
        case "no directory":
            a_node.directory = tmp_path / "none"
        case "a name too long":
            a_node.directory = tmp_path / ("d" * 100)
            a_node.directory.mkdir()
        case "locked":
            a_node.lock.mkdir()
        case "no raylet":
            environment["RAY_RAYLET_PID"] = ""
    report = tmp_path / "report"
    command = ["bash", "-c", f"exec {command_of_models()} {' '.join(a_node.arguments(report))}"]
    subprocess.run(command, env=a_node.environment | environment, check=True, timeout=60, capture_output=True)
    found, own = read(report)
    said = origin(found["environment"])
    assert said is not None
    assert not said[1], said
    assert own["parent"] == os.getpid()
    assert found["path"][0] == str(Path(SCRIPT).parent)


@pytest.mark.slow
def test_the_first_launchers_start_one_server(a_node: Node, tmp_path: Path) -> None:
    """The real one: it has imported what a worker needs, and its forks share that."""
    launched = [a_node.launch(tmp_path / name, "wait") for name in "abc"]
    found = [read(tmp_path / name) for name in "abc"]
    assert [process.wait(30) for process in launched] == [0] * 3
    (server,) = {own["parent"] for _, own in found}
    a_node.started.append(subprocess.Popen(["true"]))
    try:
        maps = Path(f"/proc/{found[0][1]['pid']}/maps").read_text()
        assert "libtorch_cpu.so" in maps
        assert all(common["threads"] == [1, True] for common, _ in found)
        # less than half of what it has is its own
        assert own_bytes(found[0][1]["pid"]) < own_and_shared_bytes(found[0][1]["pid"]) / 2
    finally:
        for _, own in found:
            os.kill(own["pid"], signal.SIGKILL)
    a_node.raylet.kill()
    wait(lambda: gone(server))


@pytest.mark.slow
def test_servers_of_two_stages_start_as_one_and_share_what_the_first_has_imported(a_node: Node, tmp_path: Path) -> None:
    others = Stage("others", ("ray._private.workers.default_worker", "ray.serve"), False)

    def fork(name: str, *stages: Stage) -> tuple[dict[str, Any], int, int]:
        process = a_node.launch(tmp_path / name, "wait", "ids", stages=stages)
        found, own = read(tmp_path / name)
        assert process.wait(30) == 0
        return found, own["pid"], own["parent"]

    made = [fork("a", others, MODEL), fork("b", MODEL), fork("c", others, MODEL)]
    servers = [server for _, _, server in made]
    assert servers[0] == servers[2] != servers[1]
    libraries = [Path(f"/proc/{pid}/maps").read_text() for _, pid, _ in made]
    assert ["libtorch_cpu.so" in maps for maps in libraries] == [False, True, False]
    assert all("_raylet.so" in maps for maps in libraries)
    assert all("ray.serve" in found["imported"] for found, _, _ in made)
    assert all(found["threads"] == [1, True] for found, _, _ in made)
    # what Ray's library draws, it draws anew in each fork
    assert len({found["ray id"] for found, _, _ in made}) == 3
    # one server's death is nothing to the other
    os.kill(servers[0], signal.SIGKILL)
    wait(lambda: gone(servers[0]))
    made += [fork("d", others, MODEL), fork("e", MODEL)]
    assert made[3][2] not in servers
    assert made[4][2] == servers[1]
    for _, pid, _ in made:
        os.kill(pid, signal.SIGKILL)
    a_node.raylet.kill()
    wait(lambda: all(gone(server) for _, _, server in made))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["its imports fail", "its imports draw from Ray's random numbers"])
def test_a_server_that_cannot_be_forked_ends_and_launchers_go_on(a_node: Node, tmp_path: Path, fault: str) -> None:
    """Their connections end."""
    stage = MODEL
    if fault == "its imports fail":
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\nif 'forkserver.server' in str(sys.orig_argv): sys.modules['torch'] = None\n"
        )
    else:
        (tmp_path / "draws.py").write_text("import ray\nray.NodeID.from_random()\n")
        stage = Stage("others", ("draws",), False)
    begun = time.monotonic()
    process = a_node.launch(tmp_path / "report", stages=[stage], PYTHONPATH=str(tmp_path))
    found, own = read(tmp_path / "report")
    assert process.wait(30) == 0
    assert own["pid"] == process.pid
    assert origin(found["environment"]) is not None
    assert time.monotonic() - begun < launcher.WAIT_S


def own_bytes(pid: int) -> int:
    return psutil.Process(pid).memory_full_info().uss


def own_and_shared_bytes(pid: int) -> int:
    return psutil.Process(pid).memory_info().rss


def test_the_command_finds_this_project_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a module of the current directory was imported')")
    out = subprocess.run(
        ["bash", "-c", f"exec {command_of_models()} -c 'print(__name__)'"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONSAFEPATH": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert out.stdout == "__main__\n"
    assert sys.executable in command_of_models()
