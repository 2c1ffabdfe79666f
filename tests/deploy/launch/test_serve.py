"""`emoe serve` on the built-in model, as a user runs it: from the first line to the last process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from elastic_moe.deploy.launch.builtin import MODEL_DIR, NOTICE
from elastic_moe.deploy.launch.local_ray import free_port
from tests.e2e.conftest import load_reference
from tests.paths import ROOT

pytestmark = pytest.mark.ray
READY_S = 200
"""Generous: Ray alone takes half a minute to start on a busy machine."""


class EmoeServe:
    """The command in a session of its own, with its output."""

    def __init__(self, *args: str, **env: str) -> None:
        self.port = free_port()
        self.log = args[args.index("--log-file") + 1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "elastic_moe.deploy.cli.main", "serve", "--port", str(self.port), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "HOME"} | env,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.progress: list[str] = []
        # read all the time, so that the pipe never fills
        self._reader = threading.Thread(target=lambda: self.progress.extend(self.process.stderr or ()))
        self._reader.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def first_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def finish(self) -> None:
        """Read what is left of its progress; to be called when it has ended."""
        self._reader.join()

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*self.descendants(), psutil.Process(self.process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmoeServe]:
    """In an environment that breaks what sockets and HTTP requests within a machine may rest on. A test may name its
    workers; of two there is a spare one too."""
    workers: Sequence[str] = getattr(request, "param", ("--workers", "2"))
    long = tmp_path / ("0" * 100)
    long.mkdir()
    # a port that nobody listens on
    proxy = "http://127.0.0.1:9"
    running = EmoeServe(
        *(*workers, "--dtype", "float32", "--rebalance-interval", "0", "--log-file", str(tmp_path / "log")),
        TMPDIR=str(long),
        http_proxy=proxy,
        HTTP_PROXY=proxy,
        https_proxy=proxy,
        no_proxy="localhost",
    )
    try:
        yield running
    finally:
        running.close()


def run_directory(server: EmoeServe) -> Path:
    """Of a server that has started Ray: where its raylet's socket is."""
    [raylet] = _named(server.descendants(), "raylet")
    found = re.search(r"=(/[^ =]*/emoe\.\w+)/ray/session", " ".join(raylet.cmdline()))
    assert found
    return Path(found[1])


@pytest.mark.timeout(READY_S + 120)
def test_from_start_to_end(server: EmoeServe) -> None:
    assert server.first_line() == f"serving emoe-mini on {server.url}\n", server.progress
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        assert server.progress[0] == f"{NOTICE}\n"
        assert stat.S_IMODE(run_directory(server).stat().st_mode) == 0o700
        _ask_in_its_subjects(client)
        _ask(client)
        _ask_as_strangers_do(server)
        _rebalance_under_a_stream(server, client)
        _stop_under_a_stream(server, client)


def _ask_in_its_subjects(client: openai.OpenAI) -> None:
    """In float32 and greedy, the tokens are those of transformers on the same files."""
    reference = load_reference(MODEL_DIR)
    for prompt in ("And it came to pass", '"My dear Mr. Bennet," said', "def main(", "The SELECT statement"):
        answer = client.completions.create(
            model="emoe-mini",
            prompt=prompt,
            max_tokens=32,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        (choice,) = answer.choices
        assert choice.model_extra is not None
        ids, made = reference.tokenizer(prompt)["input_ids"], choice.model_extra["token_ids"]
        assert made == reference.greedy(ids, 32, claimed=made)
        assert choice.text == reference.text(made)


def _ask(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="emoe-mini", prompt="def main():", max_tokens=20, temperature=0)
    streamed = client.completions.create(
        model="emoe-mini", prompt="def main():", max_tokens=20, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == plain.choices[0].text
    chat = client.chat.completions.create(
        model="emoe-mini", messages=[{"role": "user", "content": "hello"}], max_tokens=5, n=2, seed=1
    )
    assert chat.usage is not None
    assert len(chat.choices) == 2
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="emoe-mini", prompt="a", max_tokens=-1)


def _ask_as_strangers_do(server: EmoeServe) -> None:
    """With names and addresses of others, too many headers, and beside connections that send nothing."""
    ask = f"{server.url}/v1/models"
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(300)]
    try:
        assert httpx.get(ask, headers={"x-forwarded-for": "192.0.2.7"}).status_code == 200
        for headers, status in (({"host": "evil.example"}, 403), ({"x": "x" * 20_000}, 431)):
            refused = httpx.get(ask, headers=headers)
            assert refused.status_code == status
            assert refused.json()["error"]["message"]
    finally:
        for connection in idle:
            connection.close()
    # every process says in one file what it does
    lines = Path(server.log).read_text().splitlines()
    assert any(" INFO coordinator[" in line and "epoch 1 serves" in line for line in lines)


def _rebalance_under_a_stream(server: EmoeServe, client: openai.OpenAI) -> None:
    ask = {"model": "emoe-mini", "prompt": "import os", "max_tokens": 200, "temperature": 0}
    extra = {"extra_body": {"ignore_eos": True}}
    expected = client.completions.create(**ask, **extra).choices[0].text
    text, operation = "", ""
    for number, chunk in enumerate(client.completions.create(**ask, **extra, stream=True)):
        text += chunk.choices[0].text
        if number == 3:
            started = httpx.post(f"{server.url}/admin/rebalance", json={})
            assert started.status_code == 202
            operation = started.json()["operation_id"]
    assert text == expected
    deadline = time.monotonic() + 60
    while (phase := httpx.get(f"{server.url}/admin/operations/{operation}").json()["phase"]) != "completed":
        assert phase != "failed"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "vllm:generation_tokens_total" in httpx.get(f"{server.url}/metrics").text


def _stop_under_a_stream(server: EmoeServe, client: openai.OpenAI) -> None:
    """A request under way is finished, a new one is refused, and no process is left."""
    stream = client.completions.create(
        model="emoe-mini", prompt="a", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    everything, directory = server.descendants(), run_directory(server)
    last = None
    for number, chunk in enumerate(stream):
        if number == 0:
            server.process.send_signal(signal.SIGTERM)
        last = chunk.choices[0].finish_reason
    assert last == "length"
    assert server.process.wait(60) == 0
    assert server.progress[-1] == "stopping\n"
    _, left = psutil.wait_procs(everything, timeout=5)
    assert left == []
    assert not directory.exists()


def _named(processes: list[psutil.Process], name: str) -> list[psutil.Process]:
    """Those of this name. A helper of the start may have ended since it was listed."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == name:
                found.append(process)
    return found


def _ended(server: EmoeServe, code: int, everything: list[psutil.Process]) -> None:
    assert server.process.wait(20) == code, server.progress
    assert psutil.wait_procs(everything, timeout=5)[1] == []


@pytest.mark.timeout(READY_S + 60)
@pytest.mark.parametrize("server", [("--workers", "1", "--no-standby")], indirect=True, ids=["one worker"])
def test_the_death_of_the_raylet_ends_the_server_with_a_line(server: EmoeServe) -> None:
    """So does the death of GCS, which the supervisor is told of in the same way."""
    assert server.first_line().startswith("serving "), server.progress
    everything, directory = server.descendants(), run_directory(server)
    _named(everything, "raylet")[0].kill()
    _ended(server, 1, everything)
    server.finish()
    assert server.progress[-1].startswith("emoe: error: Ray's raylet (process ")
    assert not directory.exists()


@pytest.mark.timeout(READY_S + 60)
@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]], ids=["SIGINT", "SIGTERM twice"]
)
def test_a_signal_during_the_start_leaves_nothing(server: EmoeServe, signals: list[int]) -> None:
    deadline = time.monotonic() + READY_S
    while not _named(server.descendants(), "gcs_server"):
        assert time.monotonic() < deadline, server.progress
        time.sleep(0.05)
    everything = server.descendants()
    for number in signals:
        server.process.send_signal(number)
    _ended(server, 0, everything)
    server.finish()
    assert server.progress[-1] == "stopping\n"
    # a busy machine has said in between that Ray still starts
    assert not [line for line in server.progress[1:-1] if "starting Ray" not in line]
